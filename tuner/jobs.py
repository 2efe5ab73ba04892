"""What crosses between the coordinator and its workers: only values."""

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
    """`work` names the function a worker calls, as module:function(argument, report, slot).

    `keep` are folders, at the same path wherever the job is carried out, whose files must outlive
    the place: the job's next attempt finds them, and so does who handed it out. `whole` is the one
    of them that is an export: it appears in one step. `everywhere`: carried out once on every node,
    before any other job is there; the values must be equal, and the first is the job's. `folders`
    are what a node needs for it that may have to be shipped there. `stall`: when a job that reports
    nothing is taken for one that hangs; an engine that carries jobs out in the coordinator's own
    process cannot see to it.
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
    `problems` and exit `code`. failed: it raised something else; `reason` is the exception, `trace`
    the traceback. lost: its worker died, or was given up; `loss_cause` says why, for programs.
    """

    kind: Literal["done", "refused", "failed", "lost"]
    value: Any = None
    reason: str = ""
    traceback: str = ""
    problems: tuple[str, ...] = ()
    exit_code: int = 0
    loss_cause: LossCause = ""


def stall_of(engine: EngineSettings, *, paced: bool) -> Stall:
    """What engine.stall says.

    `paced`: a report comes after each epoch, and little is done after the last one.
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
