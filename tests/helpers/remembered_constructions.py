"""What hundreds of tests construct alike is constructed once in a process, and is the same to the bit."""

import copy
import sys
from collections.abc import Callable
from typing import Any


def remember_constructions() -> None:
    """In those modules that are loaded: where few tests run, the others need not be."""
    if resnet := sys.modules.get("tuner.models.resnet"):
        vars(resnet)["build_slim_resnet"] = _remember_model(vars(resnet)["build_slim_resnet"])
    if rdb := sys.modules.get("optuna.storages._rdb.storage"):
        manager = vars(rdb)["_VersionManager"]
        manager._create_alembic_script = _remember_script(manager._create_alembic_script)


def _remember_model(build: Callable[[int], Any]) -> Callable[[int], Any]:
    """The model is built with the layers of one that is 16 times as large, whose numbers are drawn for nothing."""
    import torch

    built: dict[tuple[object, ...], tuple[Any, torch.Tensor]] = {}

    def build_or_copy(outputs: int) -> Any:
        device = torch.get_default_device()
        if device.type != "cpu":
            return build(outputs)
        key = (outputs, torch.get_default_dtype(), torch.get_rng_state().numpy().tobytes())
        if key not in built:
            model = build(outputs)
            built[key] = model, torch.get_rng_state()
        model, state_after = built[key]
        torch.set_rng_state(state_after)
        return copy.deepcopy(model)

    return build_or_copy


def _remember_script(create: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Optuna's migrations: ten modules that are read three times for each database that is made."""
    created: list[Any] = []

    def create_once(manager: Any) -> Any:
        if not created:
            created.append(create(manager))
        return created[0]

    return create_once
