"""`data.augment` in a space file: names, mappings by hand, what may be searched in them, and what is refused."""

from typing import Any

import jsonschema
import pytest
import yaml

from tuner.config import parsing, yaml_document
from tuner.config.augmentation import (
    POLICIES,
    REFUSED_KEYS,
    AugmentationPolicy,
    RandAugmentOptions,
    resolve_policy,
)
from tuner.config.data_options import ImageOptions
from tuner.config.json_schema import space_schema
from tuner.config.space import Space, dump_yaml
from tuner.errors import SpaceError
from tuner.search.study_identity import Comparison, defaulted_keys, identity

HEADS = {
    "classification": "task: classification\nmodel: resnet18_slim\ndata: {name: digits",
    "detection": "task: detection\nmodel: yolox_s\ndata: {name: coco, path: x",
    "instance_segmentation": "task: instance_segmentation\nmodel: maskrcnn_resnet50_fpn\ndata: {name: coco, path: x",
    "segmentation": "task: segmentation\nmodel: lraspp_mobilenet_v3_large\ndata: {name: masks, path: x",
}


def space(augment: str, task: str = "classification") -> Space:
    text = f"{HEADS[task]}, augment: {augment}}}"
    return parsing.parse_space(yaml_document.parse_document(text, "space.yaml"))


class Middle:
    """A trial of which every number is the middle of its range, and every choice the last option."""

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return (low + high) / 2

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return (low + high) // 2

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[-1]


@pytest.mark.parametrize("task", POLICIES)
def test_every_policy_of_a_task_is_accepted_by_it(task: str) -> None:
    for name, policy in POLICIES[task].items():
        assert space(name, task).sample(None).data.options["augment"] == name
        assert resolve_policy(ImageOptions(augment=name).augment, task) == policy
        assert (policy == AugmentationPolicy()) == (name == "none")
        used = policy.model_dump(exclude_defaults=True)
        assert not used.keys() & REFUSED_KEYS[task].keys()


def test_a_mapping_reaches_the_options_as_it_is_written() -> None:
    options = space("{flip: true, crop: 0.5, randaugment: {magnitude: 12}}").sample(None).data
    assert options.options["augment"] == {
        "flip": True,
        "crop": 0.5,
        "randaugment": {"magnitude": 12.0},
    }
    image = ImageOptions(augment=options.options["augment"])
    assert isinstance(image.augment, AugmentationPolicy)
    assert image.augment.randaugment_options == RandAugmentOptions(operations=2, magnitude=12.0)


SEARCHED = (
    "{flip: [false, true], crop: {low: 0.2, high: 0.8}, "
    "hue: {low: 0, high: 0.1, when: {flip: true}}, "
    "randaugment: {operations: [1, 2], magnitude: {low: 5, high: 15}}}"
)


def test_the_keys_of_a_mapping_are_searched_each_by_itself() -> None:
    searched = space(SEARCHED)
    names = [dimension.name for dimension in searched.dimensions]
    assert names == [
        "data.augment.flip",
        "data.augment.crop",
        "data.augment.hue",
        "data.augment.randaugment.operations",
        "data.augment.randaugment.magnitude",
    ]
    assert len(list(searched.plugin_combinations())) == 1  # the data are not read for each
    run = searched.sample(Middle(), 0)
    assert run.data.options["augment"] == {
        "flip": True,
        "crop": 0.5,
        "hue": 0.05,
        "randaugment": {"operations": 2, "magnitude": 10.0},
    }
    document = yaml_document.parse_document(dump_yaml(run.to_dict()), "best.yaml")
    assert parsing.parse_space(document).sample(None, run.seed) == run


@pytest.mark.parametrize("augment", [SEARCHED, "[none, light]", "{scale: 0.2}", "flip"])
def test_a_space_survives_its_own_dump_and_is_what_its_schema_says(augment: str) -> None:
    before = space(augment)
    text = dump_yaml(before.to_dict())
    assert parsing.parse_space(yaml_document.parse_document(text, "space.yaml")) == before
    jsonschema.Draft202012Validator(space_schema()).validate(yaml.safe_load(text))


def test_an_override_sets_one_key_of_a_mapping() -> None:
    text = f"{HEADS['classification']}, augment: {{flip: true}}}}"
    document = yaml_document.parse_document(text, "space.yaml")
    changed = parsing.apply_overrides(document, ["data.augment.crop=0.4"])
    options = parsing.parse_space(changed).sample(None).data.options
    assert options["augment"] == {"flip": True, "crop": 0.4}


@pytest.mark.parametrize(
    ("task", "augment", "problem"),
    [
        ("classification", "ligth", "data.augment: expected none, flip, light, standard"),
        ("classification", "ligth", "got the string 'ligth'; did you mean 'light'?"),
        ("classification", "{}", "data.augment: an empty mapping; name at least one of flip, "),
        ("classification", "{flp: true}", "data.augment.flp: unknown key; did you mean 'flip'?"),
        ("classification", "{crop: 1.5}", "data.augment.crop: must be at most 1, got 1.5"),
        ("classification", "{crop: {low: 0, high: 1}}", "data.augment.crop.low: must be above 0"),
        ("classification", "{flip: 1}", "data.augment.flip: expected true or false, got 1"),
        ("classification", "{randaugment: {magnitude: 31}}", "data.augment.randaugment.magnitude"),
        (
            "classification",
            "{mosaic: 0.5}",
            "data.augment.mosaic: classification cannot use it: a mosaic of four images has four",
        ),
        (
            "detection",
            "randaugment",
            "data.augment: detection cannot use randaugment: some of its operations move pixels, "
            "and boxes would stay where they were (allowed: none, flip, light, standard, strong)",
        ),
        (
            "detection",
            "[flip, trivialaugment]",
            "data.augment: detection cannot use trivialaugment",
        ),
        (
            "segmentation",
            "{iou_crop: [false, true]}",
            "data.augment.iou_crop: segmentation cannot use it: it is made for images with boxes; "
            "use crop",
        ),
        ("segmentation", "{randaugment: {magnitude: 3}}", "data.augment.randaugment: segmentation"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(task: str, augment: str, problem: str) -> None:
    with pytest.raises(SpaceError) as error:
        space(augment, task)
    about = [line for line in error.value.problems if "data.augment" in line]
    assert len(about) == 1 and about[0].startswith("space.yaml:3: ") and problem in about[0]


@pytest.mark.parametrize("augment", ["{mosaic: 0, flip: true}", "{iou_crop: false, flip: true}"])
def test_a_key_that_is_off_is_not_refused(augment: str) -> None:
    space(augment)


def test_views_of_policies_are_checked() -> None:
    with pytest.raises(SpaceError) as error:
        space("light, views: 1")
    assert error.value.problems == (
        "space.yaml:3: data.views: 1 with augment: light shows the same pixels in every epoch; "
        "write 2 or more (versions in turn, which can be cached), null (drawn anew in each epoch), "
        "or leave it out",
    )
    space("light, views: 8")
    for flip_alone in ("{flip: true}", "{flip: true, crop: [null, 0.5]}"):
        with pytest.raises(SpaceError, match="a flip makes only 2 versions"):
            space(f"{flip_alone}, views: 8")


def test_a_study_goes_on_with_the_same_policy_alone() -> None:
    def differences(study: str, file: str) -> list[str]:
        a, b = space(study), space(file)
        return Comparison(identity(a), defaulted_keys(a), identity(b), defaulted_keys(b)).problems

    assert differences(SEARCHED, SEARCHED) == []
    changed = differences("{flip: true, crop: 0.5}", "{flip: true, crop: 0.4}")
    assert changed == ["with data.augment.crop=0.5, this file has 0.4"]
    assert differences("{flip: true}", "{flip: true, crop: 0.4}")
