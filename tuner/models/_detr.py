"""What RT-DETR and D-FINE share.

Both are models of the package transformers: its modules become stages, its own losses are used,
and weights are read from safetensors.

Wolf et al., Transformers: State-of-the-Art Natural Language Processing, EMNLP 2020,
https://github.com/huggingface/transformers.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from tuner.config.requirements import pip_install
from tuner.core.detectors import MAX_OBJECTS, DetectorHead, DetectorStage, Objects, pad_objects
from tuner.core.input_spec import ImageInputSpec, TensorTree
from tuner.core.types import StagedModel
from tuner.core.weights import fetch_weights, is_path, read_state_dict
from tuner.errors import DataError, SpaceError, limit_listing
from tuner.models._detector_backbone import STRIDE, CanvasCheck, backbone_stages
from tuner.models._hub import WEIGHTS_FILE, hub_url
from tuner.preprocessing.tokenization import silence_transformers

# RGB of 0..1, 640 pixels a side
INPUT_SPEC = ImageInputSpec(640, 640, "bilinear", (0.0,) * 3, (1.0,) * 3, fit="stretch")
CLASS_PARAMETER_PREFIXES = (
    "class_embed.",
    "model.decoder.class_embed.",
    "model.enc_score_head.",
    "model.denoising_class_embed.",
)
# the probability of an object with which a new class layer begins, in the authors' own code
CLASS_PRIOR = 0.01
CHECKS_VARIABLE = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        SpaceError: It is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise SpaceError(
            f"model.name: RT-DETR and D-FINE need the package transformers: {pip_install('text')}"
        ) from None


def build_detr(
    home: Path, name: str, kind: Any, config: Any, hub: str, weights: str
) -> StagedModel:
    """A detector as a staged model.

    Depth 1 freezes the stem, each of the depths 2 to 5 one stage of the backbone more, and depth 6
    the hybrid encoder too.

    Args:
        home: The folder of caches and downloads.
        name: The model's name in the space file.
        kind: The detector's class in transformers.
        config: Its configuration.
        hub: The repository of the published weights on the hub.
        weights: default: those of `hub`; none; or a path to a .safetensors file or to a folder
            with one.

    Raises:
        SpaceError: `weights` is a file of another kind.
        DataError: The weights are missing, damaged or of another model.
    """
    # the library's own prior follows the number of classes: of a single class it expects every
    # second query to be an object
    config.initializer_bias_prior_prob = CLASS_PRIOR
    # anchors and positions follow the size of the canvas
    config.anchor_image_size = config.eval_size = None
    detector, notes = _build_detector(home, kind, config, hub, weights)
    backbone, maps = detector.model.backbone.model, len(config.feat_strides)
    parts: dict[str, nn.Module] = {
        "stem": nn.Sequential(
            CanvasCheck(name, min_side=_min_canvas_side(config)), backbone.embedder
        )
    }
    parts |= {f"stage{i}": stage for i, stage in enumerate(backbone.encoder.stages, 1)}
    taps = tuple(backbone.out_features)
    stages = {
        **backbone_stages(parts, taps),
        "neck": HybridEncoderNeck(detector.model, taps),
        "head": QueryHead(detector, maps, config.feat_strides[0]),
    }
    return StagedModel(
        detector,
        stages,
        notes,
        native_forward=native_forward,
        can_probe=False,
        exports_batched=False,
    )


def _min_canvas_side(config: Any) -> int:
    """The side of the smallest canvas whose feature maps have a position for each query."""
    side = STRIDE
    while sum((side // stride) ** 2 for stride in config.feat_strides) < config.num_queries:
        side += STRIDE
    return side


def _build_detector(
    home: Path, kind: Any, config: Any, hub: str, weights: str
) -> tuple[Any, tuple[str, ...]]:
    if weights == "none":
        return freeze_untrained(kind(config)), ()
    path = _weights_path(home, hub, weights)
    # an export has entries of tuner's beside its weights
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith("tuner.")}
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"weights: {path}: {key} holds NaN or infinite values")
    scores = state.get("model.enc_score_head.weight")
    if not is_path(weights) or scores is None or len(scores) != config.num_labels:
        state = {k: v for k, v in state.items() if not k.startswith(CLASS_PARAMETER_PREFIXES)}
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        with silence_transformers():
            detector, loading_info = kind.from_pretrained(
                None, config=config, state_dict=state, **options
            )
    except (RuntimeError, ValueError) as error:  # so it fails on tied parameters of other shapes
        raise DataError(
            f"weights: {path}: these are another model's weights ({str(error).splitlines()[0]})"
        ) from None
    mismatched_keys = (key for key, *_ in loading_info["mismatched_keys"])
    new_keys = sorted({*loading_info["missing_keys"], *mismatched_keys})
    differing_keys = [key for key in new_keys if not key.startswith(CLASS_PARAMETER_PREFIXES)]
    differing_keys += sorted(loading_info["unexpected_keys"])
    if differing_keys:
        listed = ", ".join(limit_listing(differing_keys, 5))
        raise DataError(
            f"weights: {path} differs from {config.model_type} in {listed}; these are another "
            "model's weights, or damaged"
        )
    notes = ("classes: new, the weights have none for these",) if new_keys else ()
    return freeze_untrained(detector), notes


def freeze_untrained(detector: Any) -> Any:
    """The detector, in which the parameters that its authors do not train became buffers.

    So no optimizer sees them. Their names stay.
    """
    for module in detector.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)
    return detector


def _weights_path(home: Path, hub: str, weights: str) -> Path:
    """The file with the weights.

    Raises:
        SpaceError: The file is of a kind that could run code.
        DataError: It cannot be downloaded.
    """
    if weights == "default":
        file_name = f"{hub.replace('/', '-')}.safetensors"
        return fetch_weights(home, hub_url(hub, WEIGHTS_FILE), name=file_name)
    path = Path(weights).expanduser()
    if path.is_dir():
        return path / WEIGHTS_FILE
    if path.suffix != ".safetensors":
        raise SpaceError(
            f"model.weights: {weights!r}: default, none, a .safetensors file, or a folder with "
            f"{WEIGHTS_FILE}"
        )
    return path


@contextlib.contextmanager
def disable_checks_for_export() -> Iterator[None]:
    """During an export, transformers omits its assertions: ONNX has no operator for them."""
    if not torch.compiler.is_exporting():
        yield
        return
    before = os.environ.get(CHECKS_VARIABLE)
    os.environ[CHECKS_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(CHECKS_VARIABLE)
        os.environ.update({CHECKS_VARIABLE: before} if before is not None else {})


class HybridEncoderNeck(DetectorStage):
    """Projections to one width, attention within the coarsest map, and fusion across the maps."""

    def __init__(self, model: Any, taps: tuple[str, ...]) -> None:
        super().__init__()
        self.projections, self.encoder, self.taps = model.encoder_input_proj, model.encoder, taps

    def compute(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = [project(x[tap]) for project, tap in zip(self.projections, self.taps, strict=True)]
        encoded_maps = self.encoder(maps).last_hidden_state
        return {f"map{i}": encoded_map for i, encoded_map in enumerate(encoded_maps)}


class QueryHead(DetectorHead):
    """Selection of queries, and the decoder.

    It calls the detector's own forward pass, and gives it the maps that its encoder would compute.
    """

    def __init__(self, detector: Any, map_count: int, stride: int) -> None:
        """`stride`: pixels of the canvas's width for each position of the finest map."""
        super().__init__()
        self.owner = (detector,)  # in a tuple, so that the whole model does not become a child
        self.map_count, self.stride = map_count, stride
        for name, child in chain(detector.model.named_children(), detector.named_children()):
            if name not in ("model", "backbone", "encoder_input_proj", "encoder"):
                self.add_module(name, child)

    def run_decoder(self, x: dict[str, Tensor], labels: list[dict[str, Tensor]] | None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        detector = self.owner[0]
        # these two flags decide about denoising, and the two modules are in no stage
        detector.training = detector.model.training = self.training
        maps: Any = [x[f"map{i}"] for i in range(self.map_count)]
        with disable_checks_for_export():
            return detector(
                None,
                inputs_embeds=maps[0],
                encoder_outputs=BaseModelOutput(last_hidden_state=maps),
                labels=labels,
            )

    def losses(self, x: dict[str, Tensor], targets: list[Objects]) -> dict[str, Tensor]:
        side = self.stride * x["map0"].shape[-1]
        labels = [
            {"class_labels": t["labels"], "boxes": box_convert(t["boxes"], "xyxy", "cxcywh") / side}
            for t in targets
        ]
        losses: dict[str, Tensor] = self.run_decoder(x, labels).loss_dict
        return losses

    def detect(self, x: dict[str, Tensor]) -> list[Objects]:
        return best_objects(self.run_decoder(x, None), self.stride * x["map0"].shape[-1])


def best_objects(outputs: Any, side: int) -> list[Objects]:
    """The best pairs of query and class of each image, scores falling.

    A query stands for one object, so no overlapping boxes have to be suppressed.

    Args:
        outputs: `logits` (n, queries, classes) and `pred_boxes` (n, queries, 4) as centre, width
            and height, relative to the canvas.
        side: Of the canvas, in pixels.
    """
    pair_scores = outputs.logits.sigmoid().flatten(1)
    scores, pairs = pair_scores.topk(min(MAX_OBJECTS, pair_scores.shape[1]))
    classes = outputs.logits.shape[-1]
    boxes = (side * box_convert(outputs.pred_boxes, "cxcywh", "xyxy")).clamp(0, side)
    return [
        {
            "boxes": image_boxes[image_pairs // classes],
            "scores": image_scores,
            "labels": image_pairs % classes,
        }
        for image_boxes, image_scores, image_pairs in zip(boxes, scores, pairs, strict=True)
    ]


def native_forward(model: nn.Module, x: TensorTree) -> TensorTree:
    """The detector as transformers calls it, from pixels to objects."""
    assert isinstance(x, Tensor)
    return pad_objects(best_objects(model(x), x.shape[-1]))
