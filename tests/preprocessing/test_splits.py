"""Splits are disjoint, cover everything, keep the classes' proportions, and follow the seed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.config.data_options import ImageOptions
from tuner.errors import DataError
from tuner.preprocessing.splits import (
    TEST,
    TRAIN,
    UNSPLIT,
    VALID,
    Items,
    assign_and_limit_splits,
    assign_splits,
    check_classes,
    limit_splits,
)


def items(counts: list[int], part: int = UNSPLIT) -> Items:
    """As many one-pixel pictures of each class; a picture's value is its place."""
    n = sum(counts)
    pictures = [np.full((1, 1), i % 256, np.uint8) for i in range(n)]
    names = tuple(f"c{i}" for i in range(len(counts)))
    return Items(pictures, np.repeat(np.arange(len(counts)), counts), names, np.full(n, part))


def counts(found: Items, part: int) -> list[int]:
    return np.bincount(found.labels[found.split == part], minlength=len(found.strata)).tolist()


def test_every_class_is_divided_in_proportion() -> None:
    found = assign_splits(items([100, 40, 20]), ImageOptions(valid=0.15, test=0.25))
    assert counts(found, TRAIN) == [60, 24, 12]
    assert counts(found, VALID) == [15, 6, 3]
    assert counts(found, TEST) == [25, 10, 5]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 40), min_size=2, max_size=5),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
    st.integers(0, 1000),
)
def test_each_item_is_in_one_part_and_each_class_in_all(
    sizes: list[int], valid: float, test: float, seed: int
) -> None:
    found = assign_splits(items(sizes), ImageOptions(valid=valid, test=test, seed=seed))
    assert set(found.split.tolist()) == {
        TRAIN,
        VALID,
        TEST,
    }  # one label an item: disjoint, and nothing is left over
    assert all(min(counts(found, part)) >= 1 for part in (TRAIN, VALID, TEST))
    assert np.array_equal(
        found.split,
        assign_splits(items(sizes), ImageOptions(valid=valid, test=test, seed=seed)).split,
    )


def test_another_seed_splits_otherwise() -> None:
    first, second = (assign_splits(items([50, 50]), ImageOptions(seed=seed)) for seed in (0, 1))
    assert counts(first, TEST) == counts(second, TEST)
    assert not np.array_equal(first.split, second.split)


def test_parts_that_are_given_stay() -> None:
    given_ = items([10, 10])
    part = given_.split.copy()
    part[::2] = TEST
    found = assign_splits(
        Items(given_.examples, given_.labels, given_.strata, part), ImageOptions(valid=0.2)
    )
    assert np.flatnonzero(found.split == TEST).tolist() == list(range(0, 20, 2))
    assert counts(found, VALID) == [1, 1]


def test_a_split_that_is_missing_is_taken_from_the_training_examples() -> None:
    listed = items([10, 10], TRAIN)
    listed.split[::2] = VALID
    complete = assign_splits(listed, ImageOptions(test=0.2))
    assert np.flatnonzero(complete.split == VALID).tolist() == list(range(0, 20, 2))
    assert counts(complete, TRAIN) == [4, 4] and counts(complete, TEST) == [1, 1]
    complete.split[0] = TRAIN  # nothing is missing: nothing moves
    again = assign_splits(complete, ImageOptions(test=0.4))
    assert np.array_equal(again.split, complete.split)


def test_limit_keeps_proportions_in_each_part() -> None:
    whole = assign_splits(items([400, 200, 100]), ImageOptions(valid=0.2, test=0.2))
    found = limit_splits(whole, ImageOptions(limit=70))
    assert counts(found, TRAIN) == [40, 20, 10]
    assert counts(found, VALID) == [40, 20, 10]
    assert counts(found, TEST) == [40, 20, 10]
    assert len(found.examples) == 210


def test_limit_leaves_no_class_out() -> None:
    found = limit_splits(assign_splits(items([500, 3, 3]), ImageOptions()), ImageOptions(limit=10))
    assert min(counts(found, TRAIN)) == 1


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([5], {}, "data: classification needs at least 2 classes, found 1 ('c0')"),
        ([], {}, "data: classification needs at least 2 classes, found none"),
        (
            [5, 0, 0],
            {},
            "data: classes with 0 examples: 'c1', 'c2'; add some or remove the classes",
        ),
        (
            [5, 1, 2],
            {},
            "data: each class needs at least 3 examples to be split, but 'c1' has 1, 'c2' has 2; add some or give the parts themselves",
        ),
        (
            [5] * 12,
            {"limit": 10},
            "data.limit: 10, but there are 12 classes; allow one example of each at least",
        ),
    ],
)
def test_too_few_classes_or_images(sizes: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError) as error:
        _whole(items(sizes), ImageOptions(**options))
    assert str(error.value) == message


def _whole(found: Items, options: ImageOptions) -> Items:
    check_classes(found)
    return assign_and_limit_splits(found, options)


def test_enough_is_enough() -> None:
    check_classes(items([1, 1]))


def test_each_item_validates_in_exactly_one_fold_and_each_class_in_all() -> None:
    whole = items([50, 25])
    found = [
        assign_and_limit_splits(whole, ImageOptions(test=0.2, folds=5, fold=fold))
        for fold in range(5)
    ]
    assert all(np.array_equal(f.split == TEST, found[0].split == TEST) for f in found)
    assert [
        sum(int(f.split[i] == VALID) for f in found) for i in np.flatnonzero(found[0].split != TEST)
    ] == [1] * 60
    assert all(counts(f, VALID) == [8, 4] and counts(f, TRAIN) == [32, 16] for f in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 5, "fold": 5}, "data.fold: 5, but there are 5 folds, 0 to 4"),
        (
            {"folds": 20},
            "data.folds: 20, but there are 14 examples to train and validate with; lower it",
        ),
    ],
)
def test_impossible_folds_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError) as error:
        assign_and_limit_splits(items([10, 8]), ImageOptions(test=0.25, **options))
    assert str(error.value) == message


# -- groups and sets of labels


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 60), st.integers(0, 10_000), st.booleans())
def test_units_are_dealt_undivided_and_every_stratum_in_proportion(
    units: int, seed: int, multiple: bool
) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, units)
    rows = np.repeat(np.arange(units), sizes)
    labels = random.integers(0, 3, len(rows))
    labels[:3] = range(3)
    memberships = random.random((len(rows), 3)) < 0.3 if multiple else None
    found = assign_splits(
        Items(
            list(rows), labels, ("a", "b", "c"), np.full(len(rows), UNSPLIT),
            memberships, groups=rows, group_names=tuple(map(str, range(units))),
        ),
        ImageOptions(valid=0.2, test=0.2),
    )  # fmt: skip
    splits_of = [set(found.split[rows == unit].tolist()) for unit in range(units)]
    assert all(len(splits) == 1 for splits in splits_of)
    assert set().union(*splits_of) == {TRAIN, VALID, TEST}
    each = np.eye(3, dtype=bool)[labels] if memberships is None else memberships
    for part, share in ((TRAIN, 0.6), (VALID, 0.2), (TEST, 0.2)):
        wanted = share * each.sum(0)
        # as near as the largest group lets it be
        assert (np.abs(each[found.split == part].sum(0) - wanted) <= 3 * sizes.max()).all()


def test_rare_labels_of_sets_are_divided_as_common_ones_are() -> None:
    random = np.random.default_rng(0)
    memberships = random.random((400, 6)) < np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.03])
    plain = Items(list(range(400)), np.zeros(400, np.int64), tuple("abcdef"), np.full(400, UNSPLIT))
    found = assign_splits(
        replace(plain, memberships=memberships), ImageOptions(valid=0.2, test=0.2)
    )
    shares = memberships[found.split == VALID].sum(0) / memberships.sum(0)
    assert (np.abs(shares - 0.2) < 0.06).all()
    singly = assign_splits(plain, ImageOptions(valid=0.2, test=0.2))
    drawn = memberships[singly.split == VALID].sum(0) / memberships.sum(0)
    assert np.abs(drawn - 0.2).max() > np.abs(shares - 0.2).max()


def test_folds_of_groups_hold_each_group_out_once() -> None:
    rows = np.repeat(np.arange(20), 3)
    grouped = Items(
        list(rows), np.tile([0, 1, 1], 20), ("a", "b"), np.full(60, TRAIN),
        groups=rows, group_names=tuple(map(str, range(20))),
    )  # fmt: skip
    held = []
    for fold in range(4):
        found = assign_and_limit_splits(grouped, ImageOptions(folds=4, fold=fold))
        valid = set(rows[: len(found.split)][found.split == VALID].tolist())
        assert not valid & set(np.array(found.examples)[found.split == TRAIN].tolist())
        held += [int(i) for i in np.unique(np.array(found.examples)[found.split == VALID])]
    assert len(held) == len(set(held))
