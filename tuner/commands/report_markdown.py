"""The report of a study as Markdown, for a pull request, a wiki or a message."""

from collections.abc import Iterator, Sequence

from tuner.commands import report_content, report_key_charts, report_probabilities
from tuner.commands.report_content import MAX_TABLE_ROWS, StudyReport
from tuner.commands.study_view import trial_seconds
from tuner.commands.trial_line import format_duration
from tuner.search import history


def format_markdown(report: StudyReport) -> str:
    """What the HTML page says; its plots are tables, and of its pictures the captions are here."""
    title = f"<!-- tuner's report of study {report.view.name} -->\n# {report.view.name}"
    sections = [
        ("What came out", report_content.outcome_sentences(report)),
        ("What was asked", report_content.asked_sentences(report)),
        ("The winner and the default recipe", _winner(report)),
        ("How the search went", list(_course(report))),
        ("What mattered", list(_importances(report))),
        ("Right and wrong, by class", list(_classes(report))),
        ("The most confident mistakes", list(_mistakes(report))),
        ("How sure it is, and how often it is right", list(_sureness(report))),
        ("The best trials", _best(report)),
        ("Ended early or failed", _early(report)),
        ("How to repeat it", list(_repeating(report))),
    ]
    written = ["\n\n".join((f"## {name}", *parts)) for name, parts in sections if parts]
    return "\n\n".join([title, *written]) + "\n"


def _winner(report: StudyReport) -> list[str]:
    rows = report_content.winner_table(report)
    return [format_table(("searched key", "winner", "default recipe"), rows)] if rows else []


def _course(report: StudyReport) -> Iterator[str]:
    """The learning curves of winner and default recipe, and the best score for the time."""
    label = f"validation {report.metric}"
    known = {"winner": report.winner, "default recipe": report.default}
    curves = {name: dict(t.intermediate_values) for name, t in known.items() if t is not None}
    epochs = sorted({epoch for scores in curves.values() for epoch in scores})
    if epochs:
        rows = [
            [str(e), *(f"{scores[e]:.4f}" if e in scores else "" for scores in curves.values())]
            for e in epochs
        ]
        yield f"The {label} after each epoch:"
        yield format_table(("epoch", *curves), rows)
    front = [
        (f"#{t.number}", format_duration(trial_seconds(t) or 0), f"{t.value:.4f}")
        for t in report_content.pareto_front(report.view)
    ]
    if front:
        yield "The best score for the time, of which no trial was both better and shorter:"
        yield format_table(("trial", "time", label), front)


def _importances(report: StudyReport) -> Iterator[str]:
    trials = report.view.ranked
    yield from report_content.importance_sentences(report.importances, len(trials))
    shares = [(key, f"{share:.0%}") for key, share in report.importances.items()]
    if shares:
        yield format_table(("key", "share"), shares)
    sign = history.sign_of(report.view.study.direction)
    rows = report_key_charts.key_rows(report_key_charts.axes_of(trials), trials, sign)
    if rows:
        yield f"The validation {report.metric} by the values of each key:"
        yield format_table(("key", "values", "trials", "best", "median"), rows)


def _classes(report: StudyReport) -> Iterator[str]:
    matrix = report_content.figure_values(report, "confusion")
    if matrix is not None and len(matrix["classes"]) <= MAX_TABLE_ROWS:
        rows = [
            [name, *map(str, counts)]
            for name, counts in zip(matrix["classes"], matrix["matrix"], strict=True)
        ]
        yield (
            "Validation examples in the winner's best epoch; rows are true classes, columns "
            "predicted ones."
        )
        yield format_table(("", *matrix["classes"]), rows)
    classes = report_content.class_table(report)
    if classes:
        yield "Each class on the test examples, the worst first:"
        yield format_table(("class", "precision", "recall", "F1", "examples"), classes)


def _mistakes(report: StudyReport) -> Iterator[str]:
    """Of images the classes alone; texts as they are."""
    found = (report_content.figure_values(report, "mistakes") or {}).get("mistakes", [])
    rows = [(m["predicted"], f"{m['confidence']:.0%}", m["truth"]) for m in found]
    if rows:
        yield "Validation images; report.html shows them."
        yield format_table(("predicted", "sure", "is"), rows)
    table = report_content.csv_table(report, "mistakes.csv")
    if len(table) > 1:
        yield format_table(table[0], table[1:])


def _sureness(report: StudyReport) -> Iterator[str]:
    found = report.probabilities
    if found is None:
        return
    yield from report_probabilities.sentences(found)
    rows = report_probabilities.bin_rows(found)
    yield format_table(("probability", "answers", "mean", "right"), rows)
    classes = report_probabilities.precision_rows(found, MAX_TABLE_ROWS)
    if classes:
        yield format_table(("class", "average precision"), classes)


def _best(report: StudyReport) -> list[str]:
    header, rows = report_content.best_table(report)
    return [format_table(header, rows)] if rows else []


def _early(report: StudyReport) -> list[str]:
    rows = report_content.early_ends(report.view)
    return [format_table(("trial", "state", "reason"), rows)] if rows else []


def _repeating(report: StudyReport) -> Iterator[str]:
    """The commands, versions and digests, and the files in full."""
    commands = report_content.repeat_commands(report)
    yield "\n".join(f"    {command}   # {why}" for command, why in commands)
    facts = report_content.repeat_facts(report)
    if facts:
        yield format_table(("", ""), facts)
    for name, text in report_content.own_files(report.view.folder):
        yield f"`{name}`:"
        yield "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
