"""Checks of `data.augment`, `data.views`, `recipe.mixup` and `recipe.cutmix` that concern more than
one key.
"""

from typing import Any

from tuner.config import related_tasks
from tuner.config.augmentation import (
    FLIP_VERSIONS,
    POLICIES,
    REFUSED_KEYS,
    AugmentationPolicy,
    refused_name,
)
from tuner.config.data_options import ImageFileOptions, ImageOptions
from tuner.config.draft import Draft
from tuner.config.space import KeyPath

AUGMENT: KeyPath = ("data", "augment")
VIEWS: KeyPath = ("data", "views")
UNMIXABLE_TASKS = {
    "detection": "two mixed images have no common boxes",
    "instance_segmentation": "two mixed images have no common masks",
    "segmentation": "a pixel of two mixed images has two classes",
    "token_classification": "a token of two mixed texts has two classes",
    "text_generation": "the next token of two mixed texts is not defined",
}
"""Why a task has no mixup and cutmix."""
SHARE_OF_A_STAGE = 0.25  # of which no text model that can be frozen has less than one stage


def check_policies(draft: Draft) -> None:
    """Whether the task can use each policy, and each key of a policy that is written by hand."""
    task = related_tasks.related_task(str(draft.values.get(("task", "name"))))
    if not _has_image_options(draft) or task not in POLICIES:
        return
    for name in draft.possible_values(AUGMENT) or ():
        if isinstance(name, str) and name not in POLICIES[task]:
            draft.add_problem(AUGMENT, refused_name(name, task))
    for key, reason in REFUSED_KEYS[task].items():
        if any(path[:3] == (*AUGMENT, key) for path in draft.values) and not _is_off(draft, key):
            draft.add_problem((*AUGMENT, key), f"{task} cannot use it: {reason}")


def check_views(draft: Draft) -> None:
    """Whether an augmentation shows other pixels in other epochs, and a flip none twice as if they
    were new.
    """
    if not _has_image_options(draft):
        return
    counts = [count for count in draft.possible_values(VIEWS) or () if isinstance(count, int)]
    if 1 in counts and _may_be_more_than_none(draft):
        written = "a policy" if _is_mapping(draft) else _first_policy(draft)
        what = (
            f"1 with augment: {written} mirrors half of the images for good and shows the same "
            "pixels in every epoch; write 2 (both versions in turn, which can be cached)"
            if written == "flip"
            else f"1 with augment: {written} shows the same pixels in every epoch; write 2 or more "
            "(versions in turn, which can be cached)"
        )
        draft.add_problem(VIEWS, f"{what}, null (drawn anew in each epoch), or leave it out")
    if max(counts, default=0) > FLIP_VERSIONS and _may_be_flip_alone(draft):
        draft.add_problem(
            VIEWS,
            f"{max(counts)}, but a flip makes only {FLIP_VERSIONS} versions of an image, and "
            f"further ones would be copies; write {FLIP_VERSIONS}, or null",
        )


def check_mixing(draft: Draft) -> None:
    """Whether the task can mix examples, and whether texts are mixed behind their embeddings."""
    task = draft.values.get(("task", "name"))
    for key in ("mixup", "cutmix"):
        path = ("recipe", key)
        if draft.possible_values(path) in {(0.0,), (None,)} or not isinstance(task, str):
            continue
        if task in UNMIXABLE_TASKS:
            draft.add_problem(path, f"{task} cannot use it: {UNMIXABLE_TASKS[task]}")
        elif related_tasks.related_task(task) == "text_classification" and key == "cutmix":
            draft.add_problem(path, f"{task} cannot use it: texts have no rectangles; use mixup")
        elif related_tasks.related_task(task) == "text_classification" and _may_freeze_nothing(
            draft, path
        ):
            draft.add_problem(
                path,
                "token ids cannot be mixed, only what frozen stages make of them; write "
                "recipe.freeze_depth: 1 or more, or a condition such as when: "
                "{freeze_depth: [1, 2]}",
            )


def _may_freeze_nothing(draft: Draft, path: KeyPath) -> bool:
    """Whether a trial can have the searched key `path` and a freeze depth of 0."""
    condition = draft.conditions.get(path, {})
    share = draft.values.get(("recipe", "freeze"))
    if share is not None:
        lowest = [domain.lowest for domain in draft.domains_of(("recipe", "freeze"))] or [share]
        return min(lowest) < SHARE_OF_A_STAGE
    written = condition.get("freeze_depth") if isinstance(condition, dict) else None
    depths = written if isinstance(written, list) else [written]
    if written is None:
        depths = list(draft.possible_values(("recipe", "freeze_depth")) or ())
    return 0 in depths


def _has_image_options(draft: Draft) -> bool:
    """Whether the keys of the data source are those of images, and not some of its own."""
    field = draft.fields.get(AUGMENT)
    shared = (ImageOptions.model_fields["augment"], ImageFileOptions.model_fields["augment"])
    return any(field is own for own in shared)


def _is_mapping(draft: Draft) -> bool:
    return any(path[:2] == AUGMENT and len(path) > 2 for path in draft.values)


def _first_policy(draft: Draft) -> str:
    """The first policy's name that changes images, the flip before others; '' where none does."""
    names = [name for name in draft.possible_values(AUGMENT) or () if name not in (None, "none")]
    return "flip" if "flip" in names else next(iter(names), "")


def _may_be_more_than_none(draft: Draft) -> bool:
    return _is_mapping(draft) or bool(_first_policy(draft))


def _may_be_flip_alone(draft: Draft) -> bool:
    if not _is_mapping(draft):
        return _first_policy(draft) == "flip"
    others = [key for key in AugmentationPolicy.model_fields if key != "flip"]
    return all(_may_be_off(draft, key) for key in others)


def _possible(draft: Draft, key: str) -> tuple[Any, ...] | None:
    """The values that a key of a policy written by hand can have; None for a continuum."""
    if any(path[:3] == (*AUGMENT, key) and len(path) > 3 for path in draft.values):
        return (True,)  # a mapping of its own
    if (*AUGMENT, key) not in draft.values:
        return (AugmentationPolicy.model_fields[key].default,)
    return draft.possible_values((*AUGMENT, key))


def _may_be_off(draft: Draft, key: str) -> bool:
    return AugmentationPolicy.model_fields[key].default in (_possible(draft, key) or ())


def _is_off(draft: Draft, key: str) -> bool:
    return _possible(draft, key) == (AugmentationPolicy.model_fields[key].default,)
