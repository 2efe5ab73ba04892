"""The page of `tuner check --data`: one HTML file that needs no network and no other file."""

import base64
import io
from datetime import datetime
from typing import TYPE_CHECKING, Any

from PIL import Image

import tuner
from tuner.commands.data_findings import (
    SPLIT_WORDS,
    Finding,
    class_rows,
    doubt_rows,
    probe_sentence,
    shorten,
    size_sentence,
    summary,
)
from tuner.commands.report import render_page

if TYPE_CHECKING:
    from tuner.training.data_check import CheckedData

MAX_PICTURES = 60
MAX_ROWS = 500  # of doubted labels
MAX_EXAMPLES = 50  # of a finding
PICTURE_SIDE = 132  # pixels


def format_page(name: str, data: "CheckedData", findings: list[Finding]) -> str:
    rows = class_rows(data)
    doubts = doubt_rows(data)
    return render_page(
        "data_page.html",
        data=name,
        tuner_version=tuner.__version__,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        summary=summary(data),
        sizes=size_sentence(data),
        tiles=[
            ("examples", f"{len(data.names):,}"),
            ("classes", str(len(data.classes))),
            ("faults", str(sum(finding.is_fault for finding in findings))),
            ("notes", str(sum(not finding.is_fault for finding in findings))),
            ("doubted labels", "–" if data.probe is None else str(len(doubts))),
        ],
        split_words=SPLIT_WORDS,
        classes=rows,
        most=max((sum(numbers) for _, numbers in rows), default=0) or 1,
        findings=findings,
        max_examples=MAX_EXAMPLES,
        probe=probe_sentence(data),
        photos=list_pictures(data),
        doubts=[(shorten(row[0]), *row[1:]) for row in doubts[:MAX_ROWS]],
        more=max(0, len(doubts) - MAX_ROWS),
    )


def list_pictures(data: "CheckedData") -> list[dict[str, Any]]:
    """The first doubted images as JPEG in base64, each with what is said of it."""
    pictures = []
    doubts = data.probe.doubts if data.probe else []
    for doubt, row in zip(doubts[:MAX_PICTURES], doubt_rows(data), strict=False):
        pixels = data.take_pixels(doubt.row)
        if pixels is None:
            return []
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85)
        pictures.append(
            {
                "image": base64.b64encode(content.getvalue()).decode(),
                "name": shorten(row[0]),
                "given": row[2],
                "given_probability": row[3],
                "likely": row[4],
                "likely_probability": row[5],
            }
        )
    return pictures
