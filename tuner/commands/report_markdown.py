"""The report of a study as Markdown, for a pull request, a wiki or a message."""

from collections.abc import Sequence

from tuner.commands import report_content
from tuner.commands.report_content import StudyReport


def format_markdown(report: StudyReport) -> str:
    """What the HTML page says, without its pictures."""
    view = report.view
    header, rows = report_content.best_table(report)
    sections = [
        f"<!-- tuner's report of study {view.name} -->\n# {view.name}",
        "## What came out\n\n" + "\n\n".join(report_content.outcome_sentences(report)),
        "## What was asked\n\n" + "\n\n".join(report_content.asked_sentences(report)),
    ]
    winner = report_content.winner_table(report)
    if winner:
        table = format_table(("searched key", "winner", "default recipe"), winner)
        sections.append(f"## The winner and the default recipe\n\n{table}")
    importances = [(key, f"{share:.0%}") for key, share in report.importances.items()]
    words = "\n\n".join(
        report_content.importance_sentences(report.importances, len(report.view.ranked))
    )
    listed = f"\n\n{format_table(('key', 'share'), importances)}" if importances else ""
    sections.append(f"## What mattered\n\n{words}{listed}")
    classes = report_content.class_table(report)
    if classes:
        titles = ("class", "precision", "recall", "F1", "examples")
        sections.append(f"## Each class on the test examples\n\n{format_table(titles, classes)}")
    if rows:
        sections.append(f"## The best trials\n\n{format_table(header, rows)}")
    early = report_content.early_ends(view)
    if early:
        table = format_table(("trial", "state", "reason"), early)
        sections.append(f"## Ended early or failed\n\n{table}")
    facts = report_content.repeat_facts(report)
    command = f"    tuner train {view.folder / 'best.yaml'}"
    table = f"\n\n{format_table(('', ''), facts)}" if facts else ""
    sections.append(f"## How to repeat it\n\n{command}{table}")
    return "\n\n".join(sections) + "\n"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
