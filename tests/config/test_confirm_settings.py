"""`search.confirm`: a mapping, or one word; its keys are checked as all keys are."""

import pytest

from tuner.config import parsing, yaml_document
from tuner.config.run import ConfirmSettings
from tuner.config.space import Space, dump_yaml
from tuner.errors import SpaceError

PARTS = "task: classification\ndata: digits\nmodel: resnet18_slim\n"


def space(text: str, *overrides: str) -> Space:
    document = yaml_document.parse_document(PARTS + text, "space.yaml")
    return parsing.parse_space(parsing.apply_overrides(document, overrides))


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", (), "auto"),
        ("search: {confirm: none}", (), "none"),
        ("search: {confirm: {top: 5, repeats: 2}}", (), (5, 2)),
        ("search: {confirm: {top: 5}}", (), (5, 3)),
        ("search: {confirm: {}}", (), (3, 3)),
        ("", ("search.confirm.top=2",), (2, 3)),
        ("search: {confirm: {top: 5}}", ("search.confirm.repeats=1",), (5, 1)),
        ("search: {confirm: {top: 5}}", ("search.confirm=none",), "none"),
    ],
)
def test_the_file_and_the_command_line_set_it(
    text: str, overrides: tuple[str, ...], expected: object
) -> None:
    found = space(text, *overrides)
    confirm = found.settings.search.confirm
    if isinstance(expected, tuple):
        expected = ConfirmSettings(top=expected[0], repeats=expected[1])
    assert confirm == expected
    resolved = dump_yaml(found.to_dict())
    again = parsing.parse_space(yaml_document.parse_document(resolved, "space.yaml"))
    assert again.settings == found.settings and again.values == found.values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search: {confirm: {tpo: 2}}", "search.confirm.tpo: unknown key; did you mean 'top'? (allowed: top, repeats)"),
        ("search: {confirm: {top: 0}}", "search.confirm.top: must be at least 1, got 0"),
        ("search: {confirm: {repeats: 21}}", "search.confirm.repeats: must be at most 20, got 21"),
        ("search: {confirm: {top: [2, 3]}}", "search.confirm.top: search holds no ranges or choices; expected one value, got a list"),
        ("search: {confirm: {top: {low: 2, high: 3}}}", "search.confirm.top: search holds no ranges or choices; expected one value, got a mapping"),
        ("search: {confirm: [auto, none]}", "search.confirm: search holds no ranges or choices; expected one value, got a list"),
        ("search: {confirm: non}", "search.confirm: expected a mapping of top and repeats, auto or none, got the string 'non'; did you mean 'none'?"),
        ("search: {confirm: 3}", "search.confirm: expected a mapping of top and repeats, auto or none, got 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_where_it_is(text: str, expected: str) -> None:
    with pytest.raises(SpaceError) as caught:
        space(text)
    assert caught.value.problems == (f"space.yaml:4: {expected}",)
