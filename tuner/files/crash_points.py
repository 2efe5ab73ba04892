"""Named crash points, at which a test can kill the process: TUNER_CRASH_AT=file.renamed."""

import os

ENVIRONMENT_VARIABLE = "TUNER_CRASH_AT"
CRASH_POINTS = (
    # files.atomic_path: a study's YAML (file), what computing costs (note), a download, the digests
    # of downloads (pins), a checkpoint
    *(
        f"{what}.{step}"
        for what in ("file", "note", "download", "pins", "checkpoint")
        for step in ("begun", "written", "synced", "renamed")
    ),
    # files.atomic_folder: entries of the caches
    *(
        f"{what}.{step}"
        for what in ("images", "tokens", "activations", "probe")
        for step in ("begun", "filled", "renamed")
    ),
    "study.created",  # the study is in its database, but nothing says of what
    "search.taken",  # a trial of an earlier study is entered, the next one is not
    "search.asked",  # a trial is RUNNING, without parameters
    "search.drawn",  # its parameters are written
    "search.reported",  # an epoch was heard
    "search.files",  # its pictures lie there, its end is not told
    "search.told",  # its end is written, nothing else knows
    "search.repeating",  # a trial has the epochs of its twin, its end is not told
    "search.requeued",  # a lost trial is asked for again, its end is not told
    "search.failing",  # why a trial failed is written, that it did is not
    "artifact.kept",  # a picture lies in the study's folder, its trial does not know
    "confirm.kept",  # what a repeat of a trial gave is in the study, its checkpoints are there
    "default.tested",  # the test of the default recipe is kept, the winner is not trained
    "soup.chosen",  # the ingredients are chosen, nothing says which
    "soup.trained",  # the weights of an ingredient that was retrained lie there
    "export.filled",  # every format is written and compared, nothing vouches for them
    "export.written",  # the manifest does
    "export.moved",  # the older export is moved away, the new one not yet there
    "export.renamed",  # it is there, the older one not yet removed
)


def crash_point(point: str) -> None:
    """Ends the process here, as SIGKILL would, if TUNER_CRASH_AT names this point.

    With `:n` behind the name it ends at the nth passing.
    """
    wanted, _, count = os.environ.get(ENVIRONMENT_VARIABLE, "").partition(":")
    if wanted != point:
        return
    _times_passed[point] = _times_passed.get(point, 0) + 1
    if _times_passed[point] >= int(count or 1):
        os._exit(137)


_times_passed: dict[str, int] = {}
