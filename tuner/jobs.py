"""What an engine carries out, and how it ended: values alone cross between processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tuner import errors
from tuner.config.run import EngineSettings, parse_duration
from tuner.errors import TunerError

Stall = float | Literal["auto"] | None
"""Seconds without a report after which a job is given up.

auto: by the pace of the job's own reports. None: never.
"""


@dataclass(frozen=True)
class Job:
    """One job. `function` names what a worker calls, as module:function(argument, report, slot).

    `folders_to_keep` are folders, at the same path wherever the job is carried out, whose files
    must outlive the machine: the next attempt of the job finds them, and so does the process that
    handed the job out. `whole` is the one of them that is an export: it appears in one step.

    `on_every_node`: the job is carried out once on every node, before any other job is there; the
    values must be equal, and the first one is the job's. `folders_needed` are what a node needs for
    the job and may have to be shipped there.

    `stall`: when a job that reports nothing counts as hanging. An engine that carries out jobs in
    the coordinator's own process cannot check it.
    """

    number: int
    function: str
    argument: Any
    folders_to_keep: tuple[str, ...] = ()
    whole: str = ""
    on_every_node: bool = False
    folders_needed: tuple[str, ...] = ()
    stall: Stall = None


LossCause = Literal["", "memory", "died", "silent", "stalled", "node", "interrupted"]
"""Why a job was lost.

memory: its worker was ended as by a memory limit (SIGKILL that nobody here sent, or Ray says so).
died: its worker ended in another way.
silent, stalled: the engine gave it up, because it showed no sign of life, or no progress.
node: its node has failed.
interrupted: the coordinator ended it because the search stops.
"""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    done: `value` is what the function returned. refused: it raised a TunerError with these
    `problems` and this `exit_code`. failed: it raised another exception; `reason` is the exception,
    `traceback` its traceback. lost: its worker died, or was given up; `loss_cause` is why, for
    programs.
    """

    kind: Literal["done", "refused", "failed", "lost"]
    value: Any = None
    reason: str = ""
    traceback: str = ""
    problems: tuple[str, ...] = ()
    exit_code: int = 0
    loss_cause: LossCause = ""


def stall_of(engine: EngineSettings, *, paced: bool) -> Stall:
    """The stall limit that engine.stall states.

    `paced`: the job reports after each epoch, and does little after the last one.
    """
    if engine.stall == "never" or (engine.stall == "auto" and not paced):
        return None
    return "auto" if engine.stall == "auto" else parse_duration(engine.stall)


def to_tuner_error(outcome: Outcome) -> TunerError:
    """A worker's TunerError, with its exit code, in this process."""
    kind: type[TunerError] = getattr(errors, outcome.reason, TunerError)
    return kind(*outcome.problems)


AS_MANY_AS_POSSIBLE = 1_000_000  # workers: as many as there is room for

NextJob = Callable[[], Job | None]
"""The next job; None: nothing now, and nothing ever once no job is running."""
OnReport = Callable[[Job, Any], bool]
"""What a running job reports; answers whether it shall go on."""
OnEnd = Callable[[Job, Outcome], None]
ShouldContinue = Callable[[], bool]
"""False: end every worker now; their jobs end as lost, with the reason `interrupted`."""


class RunJobs(Protocol):
    """What an engine's `run()` gives inside `with`: carries out jobs until there are none.

    `workers`: at most so many at once.
    """

    def __call__(
        self,
        next_job: NextJob,
        on_report: OnReport,
        on_end: OnEnd,
        should_continue: ShouldContinue,
        workers: int,
    ) -> None: ...
