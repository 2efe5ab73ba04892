"""Builds every model that timm publishes weights for, and says how many load, in their own and in other sizes.

    python benchmarks/timm_names.py [--every 6] [--sizes]

Everything is on torch's meta device, where tensors have sizes and no numbers; nothing is downloaded. What timm's own model for its
own classes holds stands for the published weights: they are given the names and shapes of a model for three classes as `tuner` does
it, and must fit but for the classifiers. With --sizes, models of a fixed size are built for images that are 32 pixels larger and for
those of twice the side; their weights are resampled, and they take an image of that side. `--every 6` takes each sixth name.
"""

import argparse
import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tuner.core.weights import load_matching_state
from tuner.errors import SpaceError
from tuner.models import timm as family
from tuner.models._timm import convert_state, import_timm, timm_config
from tuner.models._timm_stages import classifier_names

OUTPUTS = 3
INITIALISERS = ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_")


def build(name: str, config: dict[str, Any], size: int | None) -> None:
    """Builds a model for images of `size` pixels and loads what stands for its weights."""
    timm = import_timm()
    heads = classifier_names(config)
    with torch.device("meta"):
        if size is not None:
            family._check_resampling(timm, f"timm/{name}", config, size)
        model: nn.Module = family._create_model(timm, f"timm/{name}", OUTPUTS, {}, config, size)
        published = timm.create_model(name, pretrained=False).state_dict()
        state = convert_state(model, published)
        starts = tuple(f"{head}." for head in heads)
        body = {key: value for key, value in state.items() if not key.startswith(starts)}
        load_matching_state(model, body, head=heads, source_name=name)


def describe(action: Callable[[], None]) -> str:
    """`loads`, `refused`, or what failed."""
    try:
        action()
    except SpaceError:
        return "refused"
    except Exception as error:  # whatever a model raises is what is counted here
        return f"fails: {type(error).__name__}: {str(error)[:160]}"
    return "loads"


def cases(names: list[str], sizes: bool) -> Iterator[tuple[str, str, dict[str, Any], int | None]]:
    """(label, name, configuration, size) of what is built."""
    timm = import_timm()
    for name in names:
        config = timm_config(timm, f"timm/{name}")
        if not sizes:
            yield name, name, config, None
        elif config.get("fixed_input_size"):
            own = config["input_size"][-1]
            yield f"{name} at {own + 32}", name, config, own + 32
            yield f"{name} at {2 * own}", name, config, 2 * own


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--sizes", action="store_true")
    arguments = parser.parse_args()
    for initialiser in INITIALISERS:  # there are no numbers to draw
        setattr(nn.init, initialiser, lambda tensor, *_, **__: tensor)
    setattr(torch, "isfinite", lambda _: torch.ones(1, dtype=torch.bool, device="cpu"))  # noqa: B010
    timm = import_timm()
    names, known = timm.list_models(pretrained=True), timm.list_models()
    timm.list_models = lambda *_, **__: known  # each name looks for itself among all of them
    start, kinds, done = time.process_time(), collections.Counter[str](), {}
    for label, name, config, size in cases(names[:: arguments.every], arguments.sizes):
        key = (name.partition(".")[0], config.get("num_classes"), config.get("input_size"), size)
        if key not in done:
            done[key] = describe(lambda: build(name, config, size))  # noqa: B023
        kinds[done[key].partition(":")[0]] += 1
        if done[key] != "loads":
            print(f"{label}: {done[key]}", flush=True)
    seconds = time.process_time() - start
    print(f"timm {timm.__version__}, {sum(kinds.values())} built: {dict(kinds)}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
