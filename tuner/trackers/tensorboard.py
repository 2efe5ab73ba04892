"""TensorBoard: a folder a run under the study's `tensorboard/`.

`tensorboard --logdir studies` shows curves, pictures, and the parameters of all trials of all
studies (HParams). The event files are written by TensorBoard's own writer, without TensorFlow.
"""

import io
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image

from tuner.messages import Epoch
from tuner.trackers._tracked import (
    FORMATS,
    RunEnd,
    TrackedRun,
    TrackedStudy,
    epoch_values,
    own_folder,
    pictures,
)

PACKAGE = "tensorboard"
STATUS = {"complete": "STATUS_SUCCESS", "pruned": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}


def start(study: TrackedStudy) -> "TensorBoardTracker":
    return TensorBoardTracker(study)


class TensorBoardTracker:
    """Writes event files. A run that is continued takes back what its earlier files say."""

    def __init__(self, study: TrackedStudy) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2, summary_v2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.study, self.folder = study, own_folder(study, "tensorboard")
        self.events, self.summaries = event_pb2, summary_pb2
        self.hparams, self.plugin_data, self.metadata = summary_v2, plugin_data_pb2, metadata
        self.make_text, self.open_writer = text_pb, EventFileWriter
        self.writers: dict[str, Any] = {}  # run's key -> its event file

    def log_epoch(self, run: TrackedRun, epoch: Epoch) -> None:
        for name, value in epoch_values(epoch).items():
            self._write_value(run, epoch.number, tag=name, simple_value=value)
        self._writer(run).flush()

    def end_run(self, run: TrackedRun, end: RunEnd) -> None:
        for name, value in end.scores.items():
            self._write_value(run, end.steps, tag=name, simple_value=value)
        for name, content in pictures(end.files).items():
            self._write_value(run, end.steps, tag=name, image=self._image(content))
        state = f"{end.state}: {end.reason}" if end.reason else end.state
        self._write(run, end.steps, summary=self.make_text("state", state))
        self._write(run, end.steps, summary=self._session_end(STATUS[end.state]))
        self.writers.pop(run.key).close()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def _writer(self, run: TrackedRun) -> Any:
        """The run's event file, with its parameters at the head."""
        if run.key not in self.writers:
            writer = self.writers[run.key] = self.open_writer(str(self.folder / run.key))
            # everything that an earlier attempt wrote into this folder is taken back
            begins = self.events.SessionLog(status=self.events.SessionLog.START)
            self._write(run, 0, session_log=begins)
            given = {key: hparam_value(value) for key, value in run.params.items()}
            self._write(run, 0, summary=self.hparams.hparams_pb(given, trial_id=run.key))
            content = {"trial": run.number, **run.params, **self.study.settings}
            self._write(run, 0, summary=self.make_text("parameters", markdown_table(content)))
            writer.flush()
        return self.writers[run.key]

    def _write(self, run: TrackedRun, step: int, **content: Any) -> None:
        event = self.events.Event(wall_time=time.time(), step=step, **content)
        self._writer(run).add_event(event)

    def _write_value(self, run: TrackedRun, step: int, **value: Any) -> None:
        summary = self.summaries.Summary(value=[self.summaries.Summary.Value(**value)])
        self._write(run, step, summary=summary)

    def _session_end(self, status: str) -> Any:
        """What the page HParams reads of a run's end."""
        info = self.plugin_data.SessionEndInfo(
            status=getattr(self.hparams.api_pb2, status), end_time_secs=time.time()
        )
        data = self.plugin_data.HParamsPluginData(session_end_info=info)
        value = self.summaries.Summary.Value(
            tag=self.metadata.SESSION_END_INFO_TAG,
            metadata=self.metadata.create_summary_metadata(data),
            tensor=self.metadata.NULL_TENSOR,
        )
        return self.summaries.Summary(value=[value])

    def _image(self, content: bytes) -> Any:
        width, height = Image.open(io.BytesIO(content), formats=FORMATS).size
        return self.summaries.Summary.Image(
            height=height, width=width, colorspace=4, encoded_image_string=content
        )


def hparam_value(value: Any) -> bool | int | float | str:
    """A parameter's value as HParams can hold it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def markdown_table(content: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in content.items())
    return f"| key | value |\n|---|---|\n{rows}"
