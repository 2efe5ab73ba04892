"""A published export as it lies on disk: its manifest, checked against its files."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config.objective import metric_label
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.errors import DataError
from tuner.files import removal
from tuner.files.atomic import file_sha256, lock_of_export, remove_unused_lock, sweep_exports
from tuner.files.removal import MANIFEST
from tuner.messages import OutputSettings

HEAT_MAPS = "heat_maps.json"  # in an export: some test examples with what speaks for their class
TEST_RESULTS = "test_results.safetensors"  # in an export: what each test example adds to its scores


@dataclass(frozen=True)
class PublishedExport:
    folder: Path
    manifest: dict[str, Any]

    @property
    def run(self) -> Run:
        return run_from_dict(self.manifest["run"])

    def code(self, format_: str) -> dict[str, str]:
        """What a prediction by that format would import and run, by its key in the manifest.

        Names such as `package.module:attribute`.
        """
        run = self.manifest["run"]
        names = {f"run.{part}.name": str(run[part]["name"]) for part in ("task", "model")}
        return {key: name for key, name in {**names, "exports": format_}.items() if ":" in name}


def run_from_dict(tree: Mapping[str, Any]) -> Run:
    """A run from `Run.tree()`, as JSON keeps it."""

    def part(section: Mapping[str, Any]) -> PluginConfig:
        options = {
            k: tuple(v) if isinstance(v, list) else v for k, v in section.items() if k != "name"
        }
        return PluginConfig(section["name"], options)

    return Run(
        part(tree["task"]),
        part(tree["data"]),
        part(tree["model"]),
        Recipe(**tree["recipe"]),
        tree["seed"],
    )


def read_export(folder: Path) -> PublishedExport | None:
    """The export in `folder`; None when there is none.

    Raises DataError when a file is missing or was changed.

    Where another export takes its place meanwhile, that one is read.
    """
    while True:
        text = _text(folder)
        if text is None:
            return None
        try:
            return _read(folder, text)
        except (DataError, FileNotFoundError):
            if _text(folder) == text:
                raise


def replaced(published: PublishedExport) -> bool:
    """Whether another export has taken the place of one that was read."""
    text = _text(published.folder)
    try:
        return text is not None and json.loads(text)["files"] != published.manifest["files"]
    except (ValueError, KeyError, TypeError):
        return True


def _text(folder: Path) -> bytes | None:
    """What the manifest in `folder` says now; None where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return (folder / MANIFEST).read_bytes()
    return None


def _read(folder: Path, text: bytes) -> PublishedExport:
    """The export in `folder`, whose manifest says `text`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(text)
        files = dict(manifest["files"])
        loaded = [str(entry["file"]) for entry in manifest["exports"].values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: damaged ({error}); remove the folder and run `tuner export` again"
        ) from None
    strange = [
        name
        for name in (*files, *loaded)
        if name not in files or name.startswith("/") or ".." in Path(name).parts
    ]
    if strange:
        raise DataError(
            f"{path}: names {strange[0]!r}, which is no file that it vouches for in its folder"
        )
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name}: missing; remove the folder and run `tuner export` again"
            )
        if file_sha256(folder / name) != digest:
            raise DataError(
                f"{folder / name}: changed since it was exported (its SHA-256 differs from "
                f"{MANIFEST}); export again"
            )
    return PublishedExport(folder, manifest)


def is_export_of(manifest: Mapping[str, Any], run: Run, outputs: OutputSettings) -> bool:
    """Whether an export is of a run, with these outputs.

    An export of an earlier version says nothing of its outputs: it has no temperature and no flips.
    It stays as it is where none is stated.
    """
    calibrate = manifest.get("calibrate")
    return (
        manifest["run_digest"] == run.digest()
        and (manifest.get("test_flips") or False) == outputs.test_flips
        and (
            calibrate == outputs.calibrate
            or (calibrate is None and isinstance(outputs.calibrate, str))
        )
    )


def recover_export(folder: Path) -> None:
    """Undoes what a killed export left: the older export comes back, half-written ones go."""
    removal.recover_older(folder)
    removal.remove_arriving(folder)
    sweep_exports(folder.parent)
    if (lock := lock_of_export(folder)).exists():
        remove_unused_lock(lock)


def describe_comparison(m: Mapping[str, Any]) -> str | None:
    """How far the model's score is from the default recipe's on the test examples, in one sentence.

    None where they were not compared. Shares are told in points, which are hundredths: scores from
    0 to 1 that are not minimised, since a loss or an error below 1 is none.
    """
    comparison = m.get("comparison")
    if comparison is None:
        return None
    if "difference" not in comparison:
        return "the default recipe won: the search found nothing better"
    score, metric = m["scores"]["test"][comparison["metric"]], comparison["metric"]
    sign = -1 if m.get("direction") == "minimise" else 1
    both = (score, comparison["default_scores"][metric])
    in_points = sign == 1 and all(0 <= value <= 1 for value in both)
    unit = "points" if in_points else metric_label(metric)

    def signed(value: float) -> str:
        return f"{100 * value:+.1f}" if in_points else f"{value:+.4f}"

    told = f"{signed(comparison['difference'])} {unit} over the default recipe on the test examples"
    if comparison["interval"] is None:
        return f"{told}, without an interval: the task keeps no results of single examples"
    low, high = comparison["interval"]
    noise = (m.get("confirmation") or {}).get("deviation")
    of_noise = "" if noise is None else f"; seed noise {signed(noise)[1:]}"
    told += f" ({100 * comparison['confidence']:g} %: {signed(low)} to {signed(high)}{of_noise})"
    if sign == -1:
        told += ", where less is better"
    if min(sign * low, sign * high) > 0:
        return told
    if max(sign * low, sign * high) < 0:
        return f"{told}: the default recipe is better"
    return f"{told}: within the noise of {m['examples']['test']:,} test examples"


def averaged_runs(soup: Mapping[str, Any] | None) -> list[str]:
    """The digests of the runs whose weights were averaged; empty where the winner is alone."""
    if soup is None or not soup["taken"]:
        return []
    return [entry["run_digest"] for entry in soup["tried"] if entry["stays"]]


def describe_soup(m: Mapping[str, Any]) -> str | None:
    """What an export is an average of, or that no average was better, in one sentence.

    None where none was tried.
    """
    soup = m.get("soup")
    if soup is None:
        return None
    winner, label = soup["tried"][0]["trial"], metric_label(soup["metric"])
    score = f"{soup['winner_score']:.4f} on validation"
    if "failed" in soup:
        return f"no soup: trial {soup['failed']['trial']} again: {soup['failed']['reason']}"
    if not soup["taken"]:
        others = ", ".join(str(entry["trial"]) for entry in soup["tried"][1:])
        return f"trial {winner} alone: no soup with {others} is better than its {label} of {score}"
    trials = ", ".join(str(entry["trial"]) for entry in soup["tried"] if entry["stays"])
    return (
        f"soup of trials {trials}: {label} {soup['score']:.4f} on validation against "
        f"{soup['winner_score']:.4f} of trial {winner} alone"
    )


def describe_check(entry: Mapping[str, Any]) -> str:
    """How a format was compared with the model: by its outputs, or by its validation score."""
    if "validation_score" not in entry:
        return f"verified to {entry['largest_difference']:.0e}"
    scores = f"{entry['validation_score']:.4f}, the model {entry['model_validation_score']:.4f}"
    return f"lossy: on validation {scores}"
