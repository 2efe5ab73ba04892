"""fields.py: one value against one field, and the sentence when it does not fit."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from pydantic.fields import FieldInfo

from tuner.config import fields
from tuner.config.data_options import ImageOptions
from tuner.config.run import EngineSettings, Recipe, SearchSettings, parse_duration
from tuner.config.search_settings import LimitSettings

LR, EPOCHS, OPTIMIZER = (Recipe.model_fields[key] for key in ("lr", "epochs", "optimizer"))
FROM = SearchSettings.model_fields["from"]
PARAMETERS = LimitSettings.model_fields["parameters"]
MEAN, NAME, TIMEOUT = (
    ImageOptions.model_fields["mean"],
    SearchSettings.model_fields["name"],
    SearchSettings.model_fields["timeout"],
)


def sentence(field: FieldInfo, value: object) -> str:
    with pytest.raises(fields.InvalidValue) as caught:
        fields.convert_value(field, value)
    return str(caught.value)


def test_only_lossless_conversions() -> None:
    assert fields.convert_value(LR, 1) == 1.0 and isinstance(fields.convert_value(LR, 1), float)
    assert fields.convert_value(MEAN, [0, 0.5, 1]) == (0.0, 0.5, 1.0)
    assert fields.convert_value(Recipe.model_fields["patience"], None) is None
    assert fields.convert_value(FieldInfo.from_annotation(list[int]), [1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (LR, "abc", "expected a number, got the string 'abc'"),
        (LR, True, "expected a number, got true"),
        (LR, None, "expected a number, got nothing"),
        (LR, 0, "must be above 0, got 0"),
        (LR, 101.0, "must be at most 100, got 101.0"),
        (LR, float("nan"), "must be a finite number, got nan"),
        (LR, [1], "expected a number, got a list"),
        (EPOCHS, 1_000_000_000, "must be at most 100,000, got 1000000000"),
        (EPOCHS, 1.0, "expected a whole number, got 1.0"),
        (EPOCHS, True, "expected a whole number, got true"),
        (
            Recipe.model_fields["patience"],
            "x",
            "expected a whole number or null, got the string 'x'",
        ),
        (
            OPTIMIZER,
            "admaw",
            "expected sgd, adam, adamw, nadam, radam, adamax, adagrad, rmsprop, adadelta or adafactor, got the string 'admaw'; did you mean 'adamw'?",
        ),
        (
            OPTIMIZER,
            3,
            "expected sgd, adam, adamw, nadam, radam, adamax, adagrad, rmsprop, adadelta or adafactor, got 3",
        ),
        (MEAN, [0.1, 0.2], "expected a list of 3 numbers or null, got a list"),
        (
            MEAN,
            [0.1, "a", 0.2],
            "expected a list of 3 numbers or null; item 2 of it must be a number, got the string 'a'",
        ),
        (FROM, ["a", 1], "expected a list; item 2 of it must be text, got 1"),
        (
            PARAMETERS,
            "5m",
            "expected how many it has: 5000000, 5M, 300k, 1.2B, got the string '5m'",
        ),
        (NAME, 2024, "expected text or null, got 2024"),
        (TIMEOUT, "0s", "a duration must be above 0 and at most 10,000d, got the string '0s'"),
        (
            TIMEOUT,
            "soon",
            "write a duration such as 90s, 10m, 1h30m, 1.5h or 2d, got the string 'soon'",
        ),
        (TIMEOUT, 90, "write a duration such as 90s, 10m, 1h30m, 1.5h or 2d, got 90"),
        (
            TIMEOUT,
            "9" * 400 + "d",
            f"a duration must be above 0 and at most 10,000d, got the string '{'9' * 57}...'",
        ),
        (
            EngineSettings.model_fields["device"],
            "cuda:\N{ARABIC-INDIC DIGIT ONE}",
            "expected auto, cpu, cuda, cuda:N or mps, got the string 'cuda:\N{ARABIC-INDIC DIGIT ONE}'",
        ),
        (
            EngineSettings.model_fields["device"],
            "gpu",
            "expected auto, cpu, cuda, cuda:N or mps, got the string 'gpu'",
        ),
        (
            EngineSettings.model_fields["device"],
            0,
            "expected auto, cpu, cuda, cuda:N or mps, got 0",
        ),
        (
            EngineSettings.model_fields["workers"],
            "many",
            "expected a whole number or auto, got the string 'many'",
        ),
        (FieldInfo.from_annotation(list[int]), "x", "expected a list, got the string 'x'"),
    ],
)
def test_a_sentence_says_what_is_allowed_and_what_was_given(
    field: FieldInfo, value: object, says: str
) -> None:
    assert sentence(field, value) == says


def test_a_long_text_is_shortened() -> None:
    assert sentence(LR, "x" * 1000) == f"expected a number, got the string '{'x' * 57}...'"


def test_what_a_field_can_be_searched_as() -> None:
    field = FieldInfo.from_annotation
    assert fields.is_number(field(int | None)) and fields.is_integer(field(int | None))
    assert fields.is_number(field(int | float)) and not fields.is_integer(field(int | float))
    assert (
        fields.is_number(field(Any))
        and not fields.is_number(field(bool))
        and not fields.is_number(field(Literal["a"]))
    )
    assert fields.is_integer(field(Annotated[int, Field(ge=1)]))
    assert (
        fields.is_sequence(field(tuple[int, ...]))
        and fields.is_sequence(field(list[int] | None))
        and not fields.is_sequence(field(str))
    )


@pytest.mark.parametrize(
    ("words", "says"), [(["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")]
)
def test_alternatives(words: list[str], says: str) -> None:
    assert fields.join_alternatives(words) == says


@pytest.mark.parametrize(
    ("text", "meant"),
    [("90s", 90), ("1h30m", 5_400), ("1.5h", 5_400), ("2d", 172_800), ("1d0.5m", 86_430)],
)
def test_a_duration_has_days_and_fractions(text: str, meant: float) -> None:
    assert fields.convert_value(TIMEOUT, text) == text and parse_duration(text) == meant
