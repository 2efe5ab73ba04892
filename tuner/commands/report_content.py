"""What a report says of a study, as plain values: HTML and Markdown show the same."""

import csv
import io
import json
import math
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.artifacts import get_all_artifact_meta
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from tuner.commands.report_probabilities import TestProbabilities, read_probabilities
from tuner.commands.study_view import StudyView, trial_seconds
from tuner.commands.trial_line import format_duration, plain_value, reached_score
from tuner.config.objective import metric_label
from tuner.deferred_figures import KIND_KEY, PREFIX
from tuner.manifest import HEAT_MAPS, describe_comparison
from tuner.search import history
from tuner.search.history import BEST_EPOCH, REASON
from tuner.search.optuna_internals import storage_of

MIN_TRIALS_FOR_IMPORTANCE = 6  # completed ones; of fewer, importances are chance
MANY_TRIALS = 100  # from which importances are more than hints
MAX_TABLE_ROWS = 30  # of a table in a report
WILSON_Z = 1.959964  # of the normal distribution's middle 95 %


class Findings(Protocol):
    """What a page shows of a model's scores: an export's manifest or the like, and the files by
    name that a task made of its predictions.
    """

    @property
    def manifest(self) -> Mapping[str, Any] | None: ...

    @property
    def artifacts(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True)
class StudyReport:
    """A study, and what follows from it for a report. `artifacts` are those of the winner."""

    view: StudyView
    manifest: Mapping[str, Any] | None
    artifacts: Mapping[str, bytes]
    importances: Mapping[str, float]
    probabilities: TestProbabilities | None

    @cached_property
    def winner(self) -> FrozenTrial | None:
        if self.manifest is not None:
            return self.view.trial(int(self.manifest["trial"]))
        return self.view.ranked[0] if self.view.ranked else None

    @cached_property
    def default(self) -> FrozenTrial | None:
        return history.default_trial(self.view.study)

    @property
    def metric(self) -> str:
        return metric_label(self.view.metric)

    @property
    def test_score(self) -> float | None:
        if self.manifest is None:
            return None
        return self.manifest["scores"]["test"].get(self.view.metric)  # type: ignore[no-any-return]


def gather_report(view: StudyView) -> StudyReport:
    """Reads everything that a report needs. Raises DataError where the export is damaged."""
    manifest = view.published.manifest if view.published else None
    number = manifest["trial"] if manifest else view.ranked[0].number if view.ranked else None
    artifacts = {} if number is None else read_artifacts(view, view.trial(int(number)))
    probabilities = read_probabilities(view.published)
    return StudyReport(view, manifest, artifacts, find_importances(view), probabilities)


def read_artifacts(view: StudyView, trial: FrozenTrial) -> dict[str, bytes]:
    """The content of a trial's files by name; files that are gone are left out."""
    contents = {}
    for meta in get_all_artifact_meta(trial, storage=storage_of(view.study)):
        path = view.folder / "artifacts" / meta.artifact_id
        if path.is_file():
            contents[meta.filename] = path.read_bytes()
    return contents


def find_importances(view: StudyView) -> dict[str, float]:
    """Which share of the score's differences each searched key explains, the largest first.

    PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023) as Optuna has it. Keys that only some trials
    have are left out. Empty with too few trials, or where they all have the same score.
    """
    completed = view.ranked
    if len(completed) < MIN_TRIALS_FOR_IMPORTANCE or len({t.value for t in completed}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            shares = optuna.importance.get_param_importances(view.study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # a study for which it is not defined
            return {}
    usable = {key: share for key, share in shares.items() if math.isfinite(share)}
    return dict(sorted(usable.items(), key=lambda pair: -pair[1]))


# -- in plain words


def budget_words(view: StudyView) -> str:
    """The budget of a search: its trials, its time, or both."""
    trials, limit = f"{view.budget} trials", view.search.get("time")
    if limit is None:
        return trials
    return f"{trials} and {limit}" if view.budget else f"{limit}, and as many trials as fit"


def asked_sentences(report: StudyReport) -> list[str]:
    """What was asked for."""
    view, content = report.view, report.view.content
    task, data, model = (_section_name(content.get(key)) for key in ("task", "data", "model"))
    path = content["data"].get("path") if isinstance(content.get("data"), dict) else None
    which = "lowest" if view.direction == "minimise" else "highest"
    search = view.search
    sentences = [
        f"Fine-tune {model} for {task.replace('_', ' ')} on {path or data}, and find the recipe "
        f"with the {which} {report.metric} on the validation examples.",
        f"The budget was {budget_words(view)}, proposed by the sampler {search.get('sampler')}; "
        f"the pruner {search.get('pruner')} ended those that promised nothing.",
    ]
    searched = searched_ranges(view.trials)
    if searched:
        listed = "; ".join(f"{key}: {text}" for key, text in searched.items())
        sentences.append(f"Searched were {listed}.")
    return sentences


def outcome_sentences(report: StudyReport) -> list[str]:
    """What came out, the most important first."""
    winner, manifest = report.winner, report.manifest
    if winner is None:
        return ["No trial completed, so there is no model."]
    sentences = []
    score = report.test_score
    if score is not None and manifest is not None:
        count = manifest["examples"]["test"]
        sentences.append(
            f"On {count:,} test examples, which were used for nothing else, the model has "
            f"{report.metric} {score:.4f}{_accuracy_words(report, score, count)}."
        )
        compared = describe_comparison(manifest)
        if compared:
            sentences.append(f"{compared[0].upper()}{compared[1:]}.")
    sentences.append(f"{_winner_words(report, winner)}.")
    confirmation = (manifest or {}).get("confirmation")
    if confirmation:
        noise = confirmation.get("deviation")
        spread = "" if noise is None else f", with a standard deviation of {noise:.4f}"
        sentences.append(
            f"Trained again {confirmation['repeats']} times with other seeds and other validation "
            f"examples, it had {metric_label(confirmation['metric'])} "
            f"{confirmation['mean']:.4f} on average{spread}."
        )
    sentences.append(f"{trial_counts(report.view)}.")
    return sentences


def _winner_words(report: StudyReport, winner: FrozenTrial) -> str:
    epochs = max(winner.intermediate_values, default=0)
    value = reached_score(winner)
    shown = "" if value is None else f": validation {report.metric} {value:.4f}"
    when = f" in epoch {winner.user_attrs.get(BEST_EPOCH)} of {epochs}" if epochs else ""
    is_default = report.default is not None and report.default.number == winner.number
    which = ", which is the default recipe" if is_default else ""
    return f"The winner is trial {winner.number}{which}{shown}{when}"


def _accuracy_words(report: StudyReport, score: float, count: int) -> str:
    if report.view.metric != "accuracy" or not 0 <= score <= 1:
        return ""
    low, high = wilson_interval(score, count)
    return f": {round(score * count):,} of them right (95 %: {low:.3f} to {high:.3f})"


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The interval of 95 % of a share of `count` examples (Wilson, JASA 1927)."""
    z2 = WILSON_Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - WILSON_Z * spread), min(1.0, centre + WILSON_Z * spread)


def trial_counts(view: StudyView) -> str:
    """How the trials ended, and what they took."""
    states = Counter(t.state for t in view.trials)
    words = {
        TrialState.COMPLETE: "completed",
        TrialState.PRUNED: "ended early",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "still running",
    }
    counts = ", ".join(f"{states[s]} {word}" for s, word in words.items() if states[s])
    seconds = sum(trial_seconds(t) or 0 for t in view.trials)
    return (
        f"Of {len(view.trials)} trials {counts or 'none ran'}; they took {format_duration(seconds)}"
    )


def importance_sentences(importances: Mapping[str, float], trials: int) -> list[str]:
    """What mattered, in words. `trials`: how many the importances are of."""
    if not importances:
        return [
            f"There are fewer than {MIN_TRIALS_FOR_IMPORTANCE} comparable trials, too few to say "
            "which key matters."
        ]
    first, *others = importances
    sentences = [
        f"{first} mattered most: it explains {importances[first]:.0%} of what sets the best "
        "trials apart."
    ]
    little = [key for key in others if importances[key] < 0.1]
    if little:
        verb = "makes" if len(little) == 1 else "make"
        sentences.append(f"{', '.join(little)} {verb} little difference in the ranges searched.")
    if trials < MANY_TRIALS:
        sentences.append(f"With {trials} trials these are hints and no proofs.")
    return sentences


def searched_ranges(trials: Sequence[FrozenTrial]) -> dict[str, str]:
    """Each searched key with its range in words."""
    domains: dict[str, BaseDistribution] = {}
    for trial in trials:
        domains |= trial.distributions
    return {key: describe_domain(domain) for key, domain in domains.items()}


def describe_domain(domain: BaseDistribution) -> str:
    """`0.001 to 0.1, logarithmic` or `sgd, adamw`."""
    if isinstance(domain, CategoricalDistribution):
        return ", ".join(plain_value(choice) for choice in domain.choices)
    low, high = getattr(domain, "low", None), getattr(domain, "high", None)
    scale = ", logarithmic" if getattr(domain, "log", False) else ""
    return f"{plain_value(low)} to {plain_value(high)}{scale}"


def _section_name(section: Any) -> str:
    """The name in a section of space.yaml: a text, a mapping with a name, or a choice of names."""
    name = section.get("name") if isinstance(section, dict) else section
    if isinstance(name, dict):
        name = name.get("choices", name)
    return " or ".join(map(str, name)) if isinstance(name, list) else str(name)


# -- tables


def early_ends(view: StudyView) -> list[tuple[str, str, str]]:
    """The pruned and failed trials: number, state, reason."""
    rows = []
    for trial in view.trials:
        if trial.state in (TrialState.PRUNED, TrialState.FAIL):
            reason = (str(trial.user_attrs.get(REASON, "")).splitlines() or [""])[0]
            default = (
                "promised less than the best trials" if trial.state == TrialState.PRUNED else ""
            )
            epochs = max(trial.intermediate_values, default=0)
            state = f"{trial.state.name.lower()} after {epochs} epochs"
            rows.append((f"#{trial.number}", state, reason or default or "no reason is kept"))
    return rows


def winner_table(report: StudyReport) -> list[tuple[str, str, str]]:
    """Each searched key with its value in the winner and in the default recipe."""
    winner, default = report.winner, report.default
    if winner is None:
        return []
    others = default.params if default is not None else {}
    keys = dict.fromkeys([*winner.params, *others])

    def shown(params: Mapping[str, Any], key: str) -> str:
        return plain_value(params[key]) if key in params else "–"

    return [(key, shown(winner.params, key), shown(others, key)) for key in keys]


def best_table(report: StudyReport) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the best trials."""
    trials = report.view.ranked[:MAX_TABLE_ROWS]
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    rows = []
    for trial in trials:
        cells = [plain_value(trial.params[k]) if k in trial.params else "–" for k in keys]
        seconds = trial_seconds(trial)
        time = "" if seconds is None else format_duration(seconds)
        rows.append([f"#{trial.number}", f"{trial.value:.4f}", time, *cells])
    return ["trial", report.metric, "time", *keys], rows


def class_table(report: Findings) -> list[tuple[str, str, str, str, str]]:
    """Precision, recall, F1 and number of tested examples of each class, the worst first."""
    classes = (report.manifest or {}).get("scores", {}).get("per_class", {})
    rows = [(name, scores) for name, scores in classes.items() if "f1" in scores]
    rows.sort(key=lambda row: row[1]["f1"])
    return [
        (name, f"{s['precision']:.3f}", f"{s['recall']:.3f}", f"{s['f1']:.3f}", str(s["examples"]))
        for name, s in rows[:MAX_TABLE_ROWS]
    ]


def figure_values(report: Findings, kind: str) -> dict[str, Any] | None:
    """The numbers of a deferred figure among the winner's artifacts, such as `confusion`."""
    for content in report.artifacts.values():
        if content.startswith(PREFIX):
            values: dict[str, Any] = json.loads(content)
            if values.pop(KIND_KEY) == kind:
                return values
    return None


def explained_examples(report: StudyReport) -> list[dict[str, Any]]:
    """Some test examples with heat maps, which the export has; none where it has not."""
    published = report.view.published
    if published is None or HEAT_MAPS not in published.manifest["files"]:
        return []
    examples: list[dict[str, Any]] = json.loads((published.folder / HEAT_MAPS).read_bytes())
    return examples


def csv_table(report: Findings, name: str) -> list[list[str]]:
    """A CSV file among the winner's artifacts, header first; empty where there is none."""
    content = report.artifacts.get(name)
    if content is None:
        return []
    return list(csv.reader(io.StringIO(content.decode(errors="replace"))))[: MAX_TABLE_ROWS + 1]


def pareto_front(view: StudyView) -> list[FrozenTrial]:
    """The completed trials that no trial beats in both score and time, by time."""
    return history.pareto_front(view.ranked, view.study.direction)


# -- to repeat it


def repeat_facts(report: StudyReport) -> list[tuple[str, str]]:
    """Versions and digests."""
    manifest = report.manifest
    if manifest is None:
        return []
    versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
    rows = [
        ("versions", f"tuner {manifest['tuner']}, {versions}"),
        ("seed", str(manifest["run"]["seed"])),
        ("SHA-256 of the run", str(manifest["run_digest"])),
        ("SHA-256 of the data", str(manifest["data_digest"])),
    ]
    files = manifest["files"]
    rows += [(name, digest) for name, digest in files.items() if "/" not in name]
    return rows


def repeat_commands(report: StudyReport) -> list[tuple[str, str]]:
    """The commands that repeat the winner and the whole search."""
    folder = report.view.folder
    commands = []
    if (folder / "best.yaml").is_file():
        commands.append((f"tuner train {shlex.quote(str(folder / 'best.yaml'))}", "the winner"))
    space = shlex.quote(str(folder / "space.yaml"))
    commands.append((f"tuner run {space} --studies elsewhere", "the whole search"))
    return commands


def own_files(folder: Path) -> list[tuple[str, str]]:
    """The YAML files of a study, with their content."""
    paths = [folder / name for name in ("best.yaml", "space.yaml")]
    return [(p.name, p.read_text(encoding="utf-8")) for p in paths if p.is_file()]
