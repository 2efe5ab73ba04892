"""The `search` section: how a space is searched, and how the winner is made."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, create_model

from tuner.config.durations import check_duration
from tuner.config.objective import Direction
from tuner.config.section import Section

AS_MANY_AS_FIT = 1_000_000  # trials: so many that the time alone is the budget
STUDY_NAME_PATTERN = re.compile(r"[^/\x00-\x1f]{1,200}")


def _check_study_name(text: str | None) -> str | None:
    if text is not None and (not STUDY_NAME_PATTERN.fullmatch(text) or text.startswith(".")):
        raise ValueError(
            "a study's name is a folder's name: at most 200 characters, no slash, no leading dot"
        )
    return text


class ConfirmSettings(Section):
    """How the best trials of a search are confirmed."""

    top: int = Field(3, ge=1, le=100, description="how many trials, the best ones")
    repeats: int = Field(3, ge=1, le=20, description="how often each is trained again")


class StopSettings(Section):
    """When a search that finds nothing better ends."""

    trials: int = Field(15, ge=1, le=1_000_000, description="so many trials in a row")
    gain: float = Field(0.0, ge=0, description="in which the best improved by no more than this")


COUNT_UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}


class LimitSettings(Section):
    """What a model may cost where it is used."""

    milliseconds: float | None = Field(
        None,
        gt=0,
        description="for one example, the median of ten calls of the model in torch on the CPU of "
        "the machine that trains",
    )
    megabytes: float | None = Field(None, gt=0, description="of its weights in float32")
    parameters: (
        Annotated[int, Field(ge=1)]
        | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[kMB]$")]
        | None
    ) = Field(None, description="how many it has: 5000000, 5M, 300k, 1.2B")

    def values(self) -> dict[str, float]:
        """The limits that are stated, by name."""
        stated = {name: value for name, value in self.model_dump().items() if value is not None}
        if isinstance(self.parameters, str):
            stated["parameters"] = float(self.parameters[:-1]) * COUNT_UNITS[self.parameters[-1]]
        return {name: float(value) for name, value in stated.items()}


EARLIER_STUDIES_KEY = "from"  # a keyword of Python, so no class body can declare it

if TYPE_CHECKING:
    EarlierStudies = Section
else:
    EarlierStudies = create_model(
        "EarlierStudies",
        __base__=Section,
        **{
            EARLIER_STUDIES_KEY: (
                tuple[str, ...],
                Field(
                    (),
                    description="studies (names or folders) whose finished trials are taken over "
                    "where they fit this file: same data, metric and direction, and parameters "
                    "within its ranges",
                ),
            )
        },
    )


class SearchSettings(EarlierStudies):
    """How the space is searched."""

    trials: int = Field(
        20,
        ge=1,
        le=AS_MANY_AS_FIT,
        description="the budget: trials that ended; with `time` the default is as many as fit",
    )
    time: Annotated[str | None, AfterValidator(check_duration)] = Field(
        None,
        description="how long the whole command takes, with the trainings after the search, test "
        "and export: 90s, 10m, 1h30m, 1.5h, 2d",
    )
    stop: StopSettings | None = Field(
        None,
        description="end where the best improved by no more than `gain` in the last `trials` "
        "trials",
    )
    target: float | None = Field(
        None, description="end as soon as a trial's metric is as good as this"
    )
    timeout: Annotated[str | None, AfterValidator(check_duration)] = Field(
        None, description="ask no more this long after the command began: 90s, 10m, 1h30m, 1.5h, 2d"
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="how parameters are proposed"
    )
    pruner: Literal["projection", "median", "successive-halving", "hyperband", "none"] = Field(
        "projection",
        description="what ends bad trials; projection: those that trials of a similar length and "
        "freeze depth show to stay below the median",
    )
    metric: str | None = Field(
        None,
        description="what is improved on the validation examples: a metric of the task, or a "
        "function of your own as package.module:function; null: the task's first",
    )
    direction: Direction | None = Field(
        None,
        description="whether higher or lower values of the metric are better; null: as the task or "
        "the function says",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="of the sampler and, with the trial's number, of each training",
    )
    name: Annotated[str | None, AfterValidator(_check_study_name)] = Field(
        None, description="of the study; null: the file's"
    )
    retries: int = Field(
        2, ge=0, le=10, description="further attempts for a trial whose worker died"
    )
    retrain: bool = Field(
        True,
        description="retrain the best on train and validation before it is tested and exported, "
        "unless `time` is too short for it; false: as its trial left it",
    )
    confirm: ConfirmSettings | Literal["auto", "none"] = Field(
        "auto",
        description="before the winner is made, the best `top` trials are trained `repeats` times "
        "more, each with another seed and another part of train and valid held out, and the best "
        "mean wins; auto: none under 30 trials, 2 x 2 under 100, 3 x 3 from 100 on",
    )
    winner: Literal["beyond-noise", "best"] = Field(
        "beyond-noise",
        description="which trial wins where none is confirmed; beyond-noise: the default recipe, "
        "unless the best trial is better by more than the noise of the validation examples (for "
        "shares of right examples, such as accuracy); best: the best trial",
    )
    limits: LimitSettings | None = Field(
        None,
        description="what the winner may cost; a trial of a model beyond a limit is ended before "
        "it is trained, and the sampler learns from it (constraints of Optuna)",
    )
    compare: Literal["default", "none"] = Field(
        "default",
        description="default: the default recipe is retrained and tested as the winner is, so that "
        "the difference on the test examples is known; none: the winner alone",
    )
    soup: Literal["none", "greedy"] = Field(
        "none",
        description="greedy: the weights of the winner are averaged with those of the other kept "
        "trials of its model and data, where that is better on the validation examples",
    )
    calibrate: Annotated[float, Field(gt=0, le=100)] | Literal["temperature", "none"] = Field(
        "temperature",
        description="what the logits of an exported classifier are divided by: temperature, what "
        "suits the validation examples best; or a number, which best.yaml has",
    )
    test_flips: bool = Field(
        False,
        description="the test, and `tuner predict`, average the outputs for an image and its "
        "mirror image; images, but no boxes",
    )
    grace: Annotated[str, AfterValidator(check_duration)] = Field(
        "8s",
        description="what SIGTERM leaves to the running epoch: a little less than the time until "
        "SIGKILL, which Kubernetes calls terminationGracePeriodSeconds",
    )
    keep: int = Field(
        3,
        ge=0,
        le=1000,
        description="trials whose best epoch's weights stay on the disk: the best so many",
    )

    @property
    def earlier_studies(self) -> tuple[str, ...]:
        """The studies whose trials are taken over: the key `from`."""
        studies: tuple[str, ...] = getattr(self, EARLIER_STUDIES_KEY)
        return studies

    @property
    def needs_no_weights(self) -> bool:
        """Whether the winner is trained again, and no weights that trials left are averaged."""
        return self.retrain and self.soup == "none"
