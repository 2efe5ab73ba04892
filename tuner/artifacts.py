"""What the dashboard shows beside the numbers: each trial's pictures and tables, and notes in Markdown."""

import tempfile
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import Trial

from tuner.files import disk_errors
from tuner.orders import Result
from tuner.run import Run
from tuner.space import Space, dump

TYPES = {".png": "image/png", ".csv": "text/csv"}


class Artifacts:
    def __init__(self, study: optuna.Study, folder: Path, metric: str) -> None:
        self.study, self.metric = study, metric
        self.folder = folder / "artifacts"
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.store = FileSystemArtifactStore(self.folder)

    def describe(self, space: Space) -> None:
        """The study's note and the metric's name."""
        import warnings

        from optuna_dashboard import save_note

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names([self.metric])
        save_note(
            self.study,
            f"Maximises **{self.metric}** on the validation examples. Trial 0 is the default recipe.\n\n```yaml\n{dump(space.tree())}```\n",
        )

    def files(self, trial: Trial, run: Run, result: Result) -> None:
        """Attaches a running trial's files and writes its note."""
        from optuna_dashboard import save_note

        with tempfile.TemporaryDirectory() as temporary:
            for name, content in result.files.items():
                path = Path(temporary) / name
                path.write_bytes(content)
                with disk_errors(self.folder):
                    upload_artifact(artifact_store=self.store, file_path=str(path), study_or_trial=trial, mimetype=TYPES.get(path.suffix))
        save_note(trial, note(run, result, self.metric))


def note(run: Run, result: Result, metric: str) -> str:
    """A trial's note: its epochs as a table, and its recipe."""
    names = list(result.epochs[0].scores) if result.epochs else []
    head = "| epoch | loss | " + " | ".join(names) + " | seconds |\n|" + "---|" * (len(names) + 3)
    rows = [
        f"| {e.number}{' **best**' if e.number == result.best else ''} | {e.loss:.4f} | {' | '.join(f'{e.scores[n]:.4f}' for n in names)} | {e.seconds:.2f} |"
        for e in result.epochs
    ]
    reason = f"\n\n{result.state}: {result.reason}" if result.reason else ""
    return "\n".join([head, *rows]) + reason + f"\n\n```yaml\n{dump({'recipe': run.recipe.model_dump(), 'seed': run.seed})}```\n"
