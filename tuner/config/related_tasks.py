"""What tasks share with related ones, such as recipes of models, and words for their outputs."""

import fnmatch
from collections.abc import Mapping
from typing import Any

from tuner.config import plugins


def read_recipe(name: str, task: str) -> dict[str, Any]:
    """The keys of the recipe with which the authors of a built-in model fine-tune it for a task.

    They are those of its family, with the keys of the first pattern that its name matches. A task
    for which a family states none may have those of a related task.
    """
    related = related_task(task)

    def of_task(recipes: Mapping[str, Any]) -> dict[str, Any]:
        return dict(recipes.get(task, recipes.get(related, {})))

    recipe = of_task(plugins.read_model_constant(name, "RECIPES", {}))
    for pattern, recipes in plugins.read_model_constant(name, "NAMED_RECIPES", {}).items():
        if fnmatch.fnmatchcase(name, pattern):
            return recipe | of_task(recipes)
    return recipe


def related_task(task: str) -> str:
    """The task whose recipes and augmentations suit a task: RECIPES_OF in its file, or itself."""
    return str(read_task_constant(task, "RECIPES_OF", task))


def output_word(task: str) -> str:
    """What a task gives, in the plural: `classes`, or OUTPUTS in its file."""
    return str(read_task_constant(task, "OUTPUTS", "classes"))


def read_task_constant(task: str, name: str, default: Any) -> Any:
    """A literal at the top of a built-in task's file; `default` where there is none, and for a task
    of the user's own.
    """
    if ":" in task or task not in plugins.list_names("task"):
        return default
    try:
        return plugins.read_constant("task", task, name)
    except LookupError:
        return default
