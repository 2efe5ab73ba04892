"""What the dashboard shows beside the numbers.

Each trial's pictures and tables, and notes in Markdown.
"""

import warnings
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import Trial

from tuner.config.objective import metric_label
from tuner.config.run import Run
from tuner.config.space import Space, dump_yaml
from tuner.dashboard.dashboard_internals import note_attributes, read_study_note
from tuner.files import removal
from tuner.files.atomic import disk_errors
from tuner.files.crash_points import crash_point
from tuner.messages import Epoch, TrialResult
from tuner.search.optuna_internals import storage_for, storage_of, study_id_of, trial_id_of
from tuner.search.write_buffer import BufferedStorage

RESULT_HEAD = "**Result:** "  # how the paragraph with the result begins in a study's note
MIME_TYPES = {".png": "image/png", ".csv": "text/csv"}


class ArtifactWriter:
    """Files lie in the study's folder, notes in its database."""

    def __init__(self, study: optuna.Study, folder: Path, metric: str) -> None:
        self.study, self.metric = study, metric
        self.folder = folder / "artifacts"
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.store = FileSystemArtifactStore(self.folder)

    def write_study_note(self, space: Space) -> None:
        """The study's note and the metric's name.

        Once, so that what somebody added to the note in the browser stays.
        """
        if self.study.metric_names is not None:
            return
        write_note(self.study, None, format_study_note(space, self.study.study_name, self.metric))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(
                [self.metric]
            )  # last: it says that the study has been described

    def save_artifacts(self, trial: Trial, run: Run, result: TrialResult) -> None:
        """Attaches a running trial's files and writes its note."""
        with removal.scratch() as temporary:
            for name, content in result.artifacts.items():
                path = temporary / name
                path.write_bytes(content)
                with disk_errors(self.folder):
                    upload_artifact(
                        artifact_store=self.store,
                        file_path=str(path),
                        study_or_trial=trial,
                        mimetype=MIME_TYPES.get(path.suffix),
                    )
                crash_point("artifact.kept")
        write_note(self.study, trial, format_trial_note(run, result, self.metric))


def write_note(study: optuna.Study, trial: Trial | None, body: str) -> None:
    """A note as optuna_dashboard keeps it.

    A note that somebody wrote on the trial in the browser stays.

    Its own `save_note` reads all notes of the study at each call, and importing it takes longer
    than many a trial.
    """
    storage = storage_for(study, trial) if trial else storage_of(study)
    about = trial_id_of(study, trial) if trial else None
    attributes = note_attributes(about, body)
    version = list(attributes)[-1]
    if trial and _has(storage, study, version):
        return
    for key, value in attributes.items():
        storage.set_study_system_attr(study_id_of(study), key, value)


def write_result_note(study: optuna.Study, result: str) -> None:
    """Puts the result of a search at the head of the study's note, in place of an earlier one.

    What somebody added to the note in the browser stays.
    """
    storage, study_id = storage_of(study), study_id_of(study)
    before = storage.get_study_system_attrs(study_id)
    written = read_study_note(before)
    others = [text for text in written.split("\n\n") if not text.startswith(RESULT_HEAD)]
    body = "\n\n".join([f"{RESULT_HEAD}{result}.", *others])
    if body == written:
        return
    for key, value in note_attributes(None, body, before).items():
        storage.set_study_system_attr(study_id, key, value)


def _has(storage: Any, study: optuna.Study, key: str) -> bool:
    if isinstance(storage, BufferedStorage):
        return storage.has_study_system_attr(key)
    return key in storage.get_study_system_attrs(study_id_of(study))


def format_study_note(space: Space, name: str, metric: str) -> str:
    """What is searched and for what, as far as it can never change."""
    sections = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in space.to_dict().items()
        if section in ("task", "data", "model", "recipe")
    }
    searched = ", ".join(f"`{d.name}`" for d in space.dimensions)
    which = "lowest" if space.settings.search.direction == "minimise" else "best"
    return f"""Searches {searched or "nothing"} for the {which} **{metric_label(metric)}** \
on the validation examples.

- One trial is the default recipe, so that the best can be compared with it.
- A trial's value is its best epoch's; its learning curve, its predictions and its scores per \
class are its artifacts.
- `tuner export {name} --trial N` retrains and exports any of them.

```yaml
{dump_yaml(sections)}```
"""


def format_trial_note(run: Run, result: TrialResult, metric: str) -> str:
    """A trial's note: how it ended, its epochs as a table, its recipe with a key a line."""
    scores = next((epoch.scores for epoch in result.epochs if epoch.scores), {})
    names = [metric, *(n for n in scores if n != metric)] if result.epochs else []
    recipe = {key: value for key, value in run.recipe.model_dump().items() if value is not None}
    carried_out = yaml.safe_dump(
        {"recipe": recipe, "seed": run.seed}, sort_keys=False
    )  # a key a line: the page is narrow
    table = ""
    if names:
        heads = ["epoch", "training loss", *map(metric_label, names), "seconds"]
        # the page puts cells side by side
        head = f"| {' | '.join(f'&emsp;{h}' for h in heads)} |\n|{'---:|' * len(heads)}"
        table = "\n".join(
            [
                head,
                *(
                    format_epoch_row(e, names, best=e.number == result.best_epoch)
                    for e in result.epochs
                ),
            ]
        )
    return f"{format_outcome(run, result, metric)}\n\n{table}\n\n```yaml\n{carried_out}```\n"


def format_outcome(run: Run, result: TrialResult, metric: str) -> str:
    reached = len(result.epochs)
    why = {"complete": "", "stopped": f"**Pruned** after epoch {reached} of {run.recipe.epochs}. "}
    ended = why.get(result.state, f"**{result.state.capitalize()}**: {result.reason}. ")
    best = next((e for e in result.epochs if e.number == result.best_epoch), None)
    told = (
        f"Best {metric_label(metric)} **{best.scores[metric]:.4f}** in epoch {best.number} of "
        f"{reached}, "
        if best
        else "No score, "
    )
    return f"{ended}{told}{result.seconds:.1f} s in all."


def format_epoch_row(epoch: Epoch, names: list[str], *, best: bool) -> str:
    cells = [
        str(epoch.number),
        f"{epoch.loss:.4f}",
        *(f"{epoch.scores[n]:.4f}" if n in epoch.scores else "" for n in names),
        f"{epoch.seconds:.2f}",
    ]
    return f"| {' | '.join(f'**{cell}**' for cell in cells) if best else ' | '.join(cells)} |"
