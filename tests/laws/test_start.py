"""The law of the start: with a learning rate near 0, training at any freeze depth leaves the validation score where it was."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.helpers import segmenters, small_transformers
from tests.helpers.detector_families import look_at_few_regions
from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import EngineSettings, PluginConfig, Recipe, Run
from tuner.core.detectors import join_targets
from tuner.core.input_spec import InputSpec, TensorTree, relative_difference
from tuner.core.types import Batch, Dataset, Prediction, StagedModel, Task
from tuner.training.batch_norm import pretrained_norms
from tuner.training.building import build_model
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext, predict_source
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

slow = pytest.mark.slow
# one small member of every family, and the side of its pictures
MEMBERS = [
    ("classification", "resnet18_slim", 32),
    pytest.param("classification", "vgg11_bn", 32, marks=slow),
    ("classification", "timm/tf_efficientnet_lite0", 32),
    ("classification", "timm/resnet10t", 32),
    ("classification", "timm/convnext_atto", 32),
    ("classification", "mobilenet_v3_small", 32),
    ("segmentation", "unet/tu-mobilenetv3_small_050", 32),
    ("segmentation", "lraspp_mobilenet_v3_large", 32),
    ("detection", "ssdlite320_mobilenet_v3_large", 64),
    pytest.param("detection", "fasterrcnn_mobilenet_v3_large_320_fpn", 64, marks=slow),
    pytest.param("detection", "fcos/timm/mobilenetv3_small_050", 64, marks=slow),
    pytest.param("detection", "retinanet/timm/resnet10t", 64, marks=slow),
    pytest.param("detection", "retinanet_resnet50_fpn", 64, marks=slow),
    ("detection", "yolox_nano", 64),
    pytest.param("detection", "yolov9_t", 64, marks=slow),
    pytest.param("detection", "rtdetr_r18", 128, marks=slow),
    pytest.param("instance_segmentation", "maskrcnn_resnet50_fpn", 64, marks=slow),
    pytest.param("instance_segmentation", "maskrcnn/timm/mobilenetv3_small_050", 64, marks=slow),
    pytest.param("detection", "dfine_n", 256, marks=slow),
    pytest.param("segmentation", "fcn_resnet50", 32, marks=slow),
]
STILL = Recipe(optimizer="sgd", lr=1e-9, epochs=1, batch_size=2, batchnorm="frozen")
EXAMPLES = 4
LARGE = {member.values[1] for member in MEMBERS if hasattr(member, "values")}
BOXES = torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.3, 0.2, 0.9, 0.8]])


@dataclass(frozen=True)
class Pictures:
    """Random pictures with targets of a task, as a model takes them."""

    task: str
    side: int
    views: int | None = 1
    lengths: Tensor | None = None
    digest: str = "pictures"

    def __len__(self) -> int:
        return EXAMPLES

    def take(self, index: Tensor, view: int) -> Batch:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(EXAMPLES, 3, self.side, self.side, generator=generator)[index]
        if self.task == "classification":
            return Batch(x, index % 3)
        if self.task == "segmentation":
            return Batch(x, (index % 3)[:, None, None].expand(-1, self.side, self.side))
        boxes = (BOXES * self.side).expand(len(index), 2, 4)
        y = {"boxes": boxes, "labels": torch.tensor([[0, 2]]).expand(len(index), 2)}
        if self.task == "instance_segmentation":
            layer = torch.zeros(self.side, self.side, dtype=torch.uint8)
            for number, (left, top, right, bottom) in enumerate((BOXES * self.side).int().tolist()):
                layer[top:bottom, left:right] = number + 1
            y["layers"] = layer.expand(len(index), 1, -1, -1)
        return Batch(x, y)


class AnyTask(Task):
    """The loss that suits the outputs; predictions are the outputs, of a detector its scores: objects
    of equal scores, as random weights give them, may change their places by rounding.
    """

    metrics = ("mean",)
    output_description = "outputs"

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        if isinstance(batch.y, dict):
            return torch.stack(list(net(join_targets(batch.x, batch.y)).values())).sum()
        output = net(batch.x)
        logits = [output] if isinstance(output, Tensor) else list(output.values())
        return sum(nn.functional.cross_entropy(each, batch.y) for each in logits)  # type: ignore[return-value]

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        outputs: TensorTree = net(x)
        return outputs["scores"] if isinstance(outputs, dict) and "scores" in outputs else outputs

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        return {"mean": 0.0}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return {}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return 0.0

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        return []


def pretrained(task: str, name: str, side: int) -> StagedModel:
    """A model whose BatchNorm has seen other pictures than those it is trained on."""
    for package in ("timm", "libreyolo", "transformers", "segmentation_models_pytorch"):
        pytest.importorskip(package, exc_type=ImportError)
    options = plugins.read_keys("model", name).fields
    without = {key: "none" for key in ("weights", "backbone") if key in options}
    config = PluginConfig(name, without)
    run = Run(PluginConfig(task, {}), PluginConfig("synthetic", {}), config, Recipe(), 0)
    staged = build_model(run, Path(), 3)
    generator = torch.Generator().manual_seed(5)
    for module in staged.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    look_at_few_regions(staged.model, 8)
    return staged


def context_of(task: str, staged: StagedModel, depth: int, side: int, home: Path) -> Any:
    prefix, net = staged.split(depth)
    device = select_device(EngineSettings(device="cpu"), home)
    pictures = Pictures(task, side)

    class Behind(Pictures):
        def take(self, index: Tensor, view: int) -> Batch:
            x, y = pictures.take(index, view)
            with torch.no_grad():
                return Batch(prefix(x), y)

    source = Behind(task, side)
    dataset: Any = None
    return TrainingContext(
        AnyTask(),
        staged,
        net,
        pretrained_norms(net),
        dataset,
        source,
        source,
        source,
        device,
        "mean",
    )


@pytest.mark.parametrize(("task", "name", "side"), MEMBERS)
def test_frozen_statistics_keep_every_output_whatever_is_frozen(
    task: str, name: str, side: int, tmp_path: Path
) -> None:
    staged = pretrained(task, name, side)
    before = {key: value.clone() for key, value in staged.model.state_dict().items()}
    first: list[TensorTree] = []
    # the first depth, some between, and the last; large models take seconds at each
    step = max(1, staged.max_depth // (2 if name in LARGE else 3))
    for depth in sorted({*range(0, staged.max_depth, step), staged.max_depth}):
        staged.model.load_state_dict(before)
        context = context_of(task, staged, depth, side, tmp_path)
        if not first:  # the same at every depth, by the law of the cut
            first = [prediction for prediction, _ in predict_source(context, context.valid, 4)]
        (progress,) = fit(context, STILL, seed=0)
        for expected, (got, _) in zip(first, progress.predictions, strict=True):
            assert relative_difference(expected, got) < 1e-3, depth


def test_every_family_is_in_the_law() -> None:
    members = {member.values[1] if hasattr(member, "values") else member[1] for member in MEMBERS}
    files = Path(plugins.__file__).parents[1].glob("models/[!_]*.py")
    tried = {plugins.find_model_family(name) for name in members} | {"transformers"}
    assert tried == {path.stem for path in files}


# -- and with the real probe


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path)


def start_and_end(run: Run, here: DeviceContext) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of the probe, and those after one epoch."""
    context = prepare_training(run, here, run_metric(run))
    for module in context.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    probe = context.task.score(predict_source(context, context.valid, 64))
    (progress,) = fit(context, run.recipe, run.seed)
    return probe, progress.epoch.scores


def run_metric(run: Run) -> str:
    metrics = {"text_generation": "perplexity", "segmentation": "mean_iou"}
    return metrics.get(run.task.name, "accuracy")


DIGITS = """
task: classification
data: {name: digits, size: 32}
model: {name: resnet18_slim, weights: bundled}
recipe: {optimizer: sgd, lr: 1.0e-9, epochs: 1, batch_size: 32}
"""


@pytest.mark.parametrize("policy", [pytest.param("frozen", marks=pytest.mark.slow), "adapt"])
def test_an_epoch_from_the_probe_keeps_its_score_whatever_is_frozen(
    policy: str, here: DeviceContext
) -> None:
    for depth in (0, 2, 4, 5):
        document = yaml_document.parse_document(DIGITS, "digits.yaml")
        words = [f"recipe.freeze_depth={depth}", f"recipe.batchnorm={policy}"]
        run = parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=1)
        probe, after = start_and_end(run, here)
        assert probe["accuracy"] > 0.8
        tolerance = 1e-3 if policy == "frozen" or depth == 5 else 0.02
        assert after["accuracy"] == pytest.approx(probe["accuracy"], abs=tolerance), depth
        assert after["log_likelihood"] == pytest.approx(
            probe["log_likelihood"], abs=3 * tolerance
        ), depth


@pytest.mark.parametrize("kind", small_transformers.KINDS)
def test_texts_keep_the_probes_score_at_every_depth(
    kind: str, tmp_path: Path, here: DeviceContext
) -> None:
    pytest.importorskip("transformers")
    small_transformers.write_model_folder(tmp_path, kind)
    small_transformers.write_csv(tmp_path / "messages.csv")
    text = (
        f"task: text_classification\ndata: {{name: text, path: {tmp_path / 'messages.csv'}}}\n"
        f"model: {{name: {kind}, folder: {tmp_path / kind}, length: 24}}\n"
        "recipe: {lr: 1.0e-9, epochs: 1}\n"
    )
    document = yaml_document.parse_document(text, "texts.yaml")
    for depth in range(3):
        words = [f"recipe.freeze_depth={depth}"]
        run = parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=1)
        probe, after = start_and_end(run, here)
        assert after == pytest.approx(probe, abs=5e-3), depth


def test_adapters_keep_the_probes_score_at_every_depth(tmp_path: Path, here: DeviceContext) -> None:
    """Exactly so before the first step: what an adapter adds begins as 0."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    small_transformers.write_model_folder(tmp_path, "gpt2")
    small_transformers.write_csv(tmp_path / "messages.csv")
    text = (
        f"task: text_classification\ndata: {{name: text, path: {tmp_path / 'messages.csv'}}}\n"
        f"model: {{name: gpt2, folder: {tmp_path / 'gpt2'}, length: 24}}\n"
        "recipe: {lr: 1.0e-9, epochs: 1}\n"
    )
    document = yaml_document.parse_document(text, "texts.yaml")
    scores = []
    for words in (
        [],
        ["recipe.lora={rank: 4}"],
        ["recipe.lora={rank: 4}", "recipe.freeze_depth=2"],
    ):
        run = parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=1)
        probe, after = start_and_end(run, here)
        assert after == pytest.approx(probe, abs=5e-3), words
        scores.append(probe)
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("policy", ["frozen", "adapt"])
def test_pixels_keep_the_probes_score_at_every_depth(
    policy: str, tmp_path: Path, here: DeviceContext
) -> None:
    weights = segmenters.write_weights(
        tmp_path / "five.safetensors", "lraspp_mobilenet_v3_large", classes=5
    )
    for depth in (0, 3, 6):
        words = (f"recipe.freeze_depth={depth}", f"recipe.batchnorm={policy}", "recipe.lr=1e-9")
        probe, after = start_and_end(segmenters.make_run(tmp_path, weights, *words), here)
        assert probe["pixel_accuracy"] > 0.7
        tolerance = 1e-3 if policy == "frozen" else 0.02
        assert after == pytest.approx(probe, abs=tolerance), depth
