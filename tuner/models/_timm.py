"""The package timm, its configuration of each model, and its weights."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tuner.config.requirements import pip_install
from tuner.core.weights import fetch_weights
from tuner.errors import SpaceError, nearest_hint
from tuner.models._hub import WEIGHTS_FILE, hub_url


def import_timm() -> Any:
    """The package timm.

    Raises:
        SpaceError: It is not installed.
    """
    try:
        import timm
        import timm.data
    except ImportError:
        raise SpaceError(
            f"model.name: timm's models need the package timm: {pip_install('timm')}"
        ) from None
    return timm


def timm_config(timm: Any, name: str) -> dict[str, Any]:
    """timm's configuration of a model's weights: size, mean, where they are, the head's name.

    Raises:
        SpaceError: timm does not have a model or weights of that name.
    """
    bare = name.partition("timm/")[2]
    known = timm.list_models()
    if bare.partition(".")[0] not in known:
        raise SpaceError(
            f"model.name: {name!r} is not known to timm "
            f"{timm.__version__}{nearest_hint(bare, known)}"
        )
    try:
        config = timm.models.get_pretrained_cfg(bare)
    except RuntimeError:  # an unknown tag
        tags = [
            tagged
            for tagged in timm.list_pretrained()
            if tagged.startswith(f"{bare.partition('.')[0]}.")
        ]
        raise SpaceError(
            f"model.name: {name!r}: timm has no such weights{nearest_hint(bare, tags)}; timm has "
            f"{', '.join(tags) or 'none'}"
        ) from None
    return {"classifier": "head", **(config.to_dict() if config else {})}


def download_timm_weights(home: Path, name: str, weights: str, config: dict[str, Any]) -> Path:
    """The file with timm's own weights.

    It comes from the hub, as safetensors, or from the address in timm's configuration.

    Raises:
        SpaceError: timm has no such weights.
        DataError: They cannot be downloaded.
    """
    if weights != "default":
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {name}; default, none, or a path to a "
            ".safetensors or .pth file"
        )
    hub = config.get("hf_hub_id")
    if hub:
        return fetch_weights(
            home,
            hub_url(str(hub), WEIGHTS_FILE),
            name=f"{str(hub).replace('/', '-')}.safetensors",
        )
    if config.get("url"):
        return fetch_weights(home, str(config["url"]))
    raise SpaceError(
        f"model.weights: timm has no weights for {name}; write weights: none, a path, or a name "
        "with a tag"
    )


def convert_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the names and shapes of the installed version of timm.

    The module of a model may have a function that converts older weights, and resamples positions
    for images of another size.
    """
    convert = getattr(
        __import__(type(model).__module__, fromlist=["_"]), "checkpoint_filter_fn", None
    )
    own = model.state_dict()
    fits = all(name in own and own[name].shape == value.shape for name, value in state.items())
    if convert is None or fits:
        return state
    with warnings.catch_warnings():  # torch's, of how timm's resampling indexes tensors
        warnings.simplefilter("ignore", UserWarning)
        return dict(convert(state, model))
