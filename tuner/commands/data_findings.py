"""What an examination of data found, as findings, tables and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.commands.columns import align_columns
from tuner.errors import limit_listing

if TYPE_CHECKING:
    from tuner.training.data_check import CheckedData

SPLIT_WORDS = ("train", "valid", "test")  # by their numbers
RARE_RATIO = 3  # between the largest and the smallest class
NARROW = 4  # the longer side by the shorter one, from which an image is odd
SMALL = 4  # the median shorter side by that of an image, from which it is odd
LISTED = 10  # doubted labels on the terminal; the page and --json have all
WEAK_PROBE = 0.8  # share of right labels below which a probe says so
BAR_CELLS = 30
MAX_NAME = 70  # characters of a text or path in a table


@dataclass(frozen=True)
class Finding:
    """Something that was found. `kind` is its name for programs, `examples` are those concerned."""

    kind: str
    is_fault: bool
    text: str
    examples: tuple[str, ...] = ()


def find_problems(data: "CheckedData") -> list[Finding]:
    """Everything that was found, the faults first."""
    findings = [
        *unreadable_files(data),
        *repeated_examples(data),
        *class_problems(data),
        *odd_images(data),
        *doubted_labels(data),
        *(Finding("warning", False, text) for text in data.dataset.warnings),
    ]
    return sorted(findings, key=lambda finding: not finding.is_fault)


def unreadable_files(data: "CheckedData") -> list[Finding]:
    count = len(data.unreadable)
    if not count:
        return []
    text = f"{count:,} of {count + len(data.names):,} images cannot be read"
    return [Finding("unreadable", True, text, data.unreadable)]


def repeated_examples(data: "CheckedData") -> list[Finding]:
    """Groups of equal examples and pairs of nearly equal ones, by what they mean."""
    leaks = [rows for rows in data.equal if len(set(data.splits[rows].tolist())) > 1]
    in_two_classes = [r for r in data.equal if len({tuple(data.counts[i]) for i in r}) > 1]
    plain = [rows for rows in data.equal if rows not in leaks and rows not in in_two_classes]
    near_leaks = [p for p in data.similar if data.splits[p[0]] != data.splits[p[1]]]
    near = [pair for pair in data.similar if pair not in near_leaks]
    is_labelled = data.run.task.name.endswith("classification")
    alike = "the same pixels" if data.image_sizes is not None else "the same text"
    kinds: list[tuple[str, bool, str, Sequence[Sequence[int]]]] = [
        ("leak", True, f"with {alike} in two splits, so that scores are too good", leaks),
        (
            "two_classes",
            is_labelled,
            f"with {alike} under different labels, one of which is wrong",
            in_two_classes if is_labelled else [],
        ),
        ("duplicate", False, f"with {alike}", plain),
        ("near_leak", False, "that are nearly alike, in two splits", near_leaks),
        ("near_duplicate", False, "that are nearly alike", near),
    ]
    return [
        Finding(
            kind,
            is_fault,
            f"{len(groups)} {'group' if len(groups) == 1 else 'groups'} of examples {text}",
            tuple(
                (" ~ " if "near" in kind else " = ").join(describe(data, row) for row in rows)
                for rows in groups
            ),
        )
        for kind, is_fault, text, groups in kinds
        if groups
    ]


def describe(data: "CheckedData", row: int) -> str:
    """An example with its split and its classes."""
    classes = [name for name, n in zip(data.classes, data.counts[row], strict=True) if n]
    inside = ", ".join([SPLIT_WORDS[int(data.splits[row])], *limit_listing(classes, 3)])
    return f"{shorten(data.names[row])} ({inside})"


def shorten(name: str) -> str:
    """The end of a path or the begin of a text, where it is long."""
    name = " ".join(name.split())
    if len(name) <= MAX_NAME:
        return name
    is_path = "/" in name and Path(name).exists()
    return f"…{name[1 - MAX_NAME :]}" if is_path else f"{name[: MAX_NAME - 1]}…"


def class_problems(data: "CheckedData") -> list[Finding]:
    """Rare classes, and classes that a split lacks."""
    totals = data.counts.sum(0)
    findings = []
    most, least = int(totals.argmax()), int(totals.argmin())
    if len(totals) > 1 and totals[most] >= RARE_RATIO * totals[least]:
        text = (
            f"classes are uneven: {data.classes[most]} {totals[most]:,}, "
            f"{data.classes[least]} {totals[least]:,}; search.metric: balanced_accuracy and "
            "recipe.class_weights: balanced count them alike"
        )
        findings.append(Finding("uneven", False, text))
    lacking = [
        f"{name} in {word}"
        for number, word in enumerate(SPLIT_WORDS)
        for name, n in zip(data.classes, data.counts[data.splits == number].sum(0), strict=True)
        if n == 0
    ]
    if lacking:
        text = f"{len(lacking)} times a split has no example of a class"
        findings.append(Finding("absent", False, text, tuple(lacking)))
    return findings


def odd_images(data: "CheckedData") -> list[Finding]:
    """Images with one shade, of an odd shape, or much smaller than the others."""
    if data.image_sizes is None:
        return []
    short, long = data.image_sizes.min(1), data.image_sizes.max(1)
    narrow = (long >= NARROW * short).nonzero()[0].tolist()
    small = (short * SMALL <= float(sorted(short)[len(short) // 2])).nonzero()[0].tolist()
    kinds = (
        ("blank", "of hardly more than one shade", data.blank),
        ("narrow", f"at least {NARROW} times as long as wide", narrow),
        ("small", f"of a {SMALL}th of the usual side or less", small),
    )
    return [
        Finding(
            kind,
            False,
            f"{len(rows)} image{'s' * (len(rows) > 1)} {text}",
            tuple(data.names[r] for r in rows),
        )
        for kind, text, rows in kinds
        if rows
    ]


def doubted_labels(data: "CheckedData") -> list[Finding]:
    if data.probe is None or not data.probe.doubts:
        return []
    return [Finding("doubted", False, f"{len(data.probe.doubts)} labels are doubted; see below")]


# -- what is printed


def check_lines(name: str, data: "CheckedData", findings: list[Finding]) -> list[str]:
    """What a person reads."""
    lines = [f"data     {name}: {summary(data)}", f"sizes    {size_sentence(data)}", ""]
    lines += class_table(data)
    lines.append("")
    for finding in findings:
        lines.append(f"{'FAULT' if finding.is_fault else 'note':<8} {finding.text}")
        lines += [f"           {line}" for line in limit_listing(finding.examples, 5)]
    if not findings:
        lines.append("ok       nothing odd was found")
    return [*lines, f"labels   {probe_sentence(data)}", *doubt_table(data)]


def summary(data: "CheckedData") -> str:
    kind = "images" if data.image_sizes is not None else "texts"
    return f"{len(data.names):,} {kind}, {data.run.task.name.replace('_', ' ')}"


def size_sentence(data: "CheckedData") -> str:
    """The smallest, the median and the largest example."""
    if data.image_sizes is not None:
        sizes = sorted(data.image_sizes.tolist(), key=lambda side: side[0] * side[1])
        write: Callable[[Any], str] = lambda s: f"{s[0]} x {s[1]}"  # noqa: E731
        unit = "pixels"
    elif data.lengths is not None:
        sizes, write, unit = sorted(data.lengths.tolist()), str, "tokens"
    else:
        return "not known"
    chosen = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    words = ("smallest", "median", "largest")
    return f"{', '.join(f'{w} {write(s)}' for w, s in zip(words, chosen, strict=True))} {unit}"


def class_rows(data: "CheckedData") -> list[tuple[str, list[int]]]:
    """Each class with its numbers in train, valid and test, the largest first."""
    by_split = [data.counts[data.splits == number].sum(0) for number in range(len(SPLIT_WORDS))]
    rows = [(name, [int(n[i]) for n in by_split]) for i, name in enumerate(data.classes)]
    return sorted(rows, key=lambda row: -sum(row[1]))


def class_table(data: "CheckedData") -> list[str]:
    rows = class_rows(data)
    most = max((sum(numbers) for _, numbers in rows), default=0) or 1
    cells = [
        (
            shorten(name),
            *(f"{n:,}" for n in numbers),
            f"{sum(numbers):,}",
            "█" * round(BAR_CELLS * sum(numbers) / most),
        )
        for name, numbers in rows
    ]
    return align_columns(("class", *SPLIT_WORDS, "all", ""), cells, right=(1, 2, 3, 4))


def probe_sentence(data: "CheckedData") -> str:
    """What the linear probe says, or why it says nothing."""
    probe = data.probe
    if probe is None:
        return f"not examined: {data.no_probe}"
    sentence = (
        f"{len(probe.doubts)} of {len(data.names):,} doubted by a linear probe on the features of "
        f"{probe.model}, which gets {probe.accuracy:.1%} of the labels right that it has not seen"
    )
    if probe.accuracy < WEAK_PROBE:
        sentence += ", so most doubts may be its own mistakes; a larger model.name doubts better"
    return sentence


def doubt_rows(data: "CheckedData") -> list[tuple[str, str, str, str, str, str]]:
    """Each doubted label: example, split, given, its probability, likely, its probability."""
    return [
        (
            data.names[doubt.row],
            SPLIT_WORDS[int(data.splits[doubt.row])],
            data.classes[doubt.given],
            f"{doubt.given_probability:.3f}",
            data.classes[doubt.likely],
            f"{doubt.likely_probability:.3f}",
        )
        for doubt in (data.probe.doubts if data.probe else [])
    ]


def doubt_table(data: "CheckedData") -> list[str]:
    rows = [(shorten(row[0]), *row[1:]) for row in doubt_rows(data)]
    if not rows:
        return []
    header = ("example", "split", "given", "p", "likely", "p")
    lines = align_columns(header, rows[:LISTED], right=(3, 5))
    return lines + ([f"... and {len(rows) - LISTED} more"] if len(rows) > LISTED else [])


def check_values(name: str, data: "CheckedData", findings: list[Finding]) -> dict[str, Any]:
    """What --json prints."""
    probe = data.probe
    doubts = [
        {
            "example": example,
            "split": split,
            "given": given,
            "given_probability": float(p),
            "likely": likely,
            "likely_probability": float(q),
        }
        for example, split, given, p, likely, q in doubt_rows(data)
    ]
    return {
        "data": name,
        "task": data.run.task.name,
        "examples": len(data.names),
        "sizes": size_sentence(data),
        "classes": {label: dict(zip(SPLIT_WORDS, n, strict=True)) for label, n in class_rows(data)},
        "findings": [
            {
                "kind": finding.kind,
                "severity": "fault" if finding.is_fault else "note",
                "text": finding.text,
                "examples": finding.examples,
            }
            for finding in findings
        ],
        "probe": None if probe is None else {"model": probe.model, "accuracy": probe.accuracy},
        "doubted": doubts,
        "not_doubted_because": data.no_probe or None,
    }
