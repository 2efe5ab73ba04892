"""Models of segmentation: cut and partition at every depth, the laws of freezing, the native loss, weights, exports."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from tests.conftest import CommandResult
from tests.helpers.http_server import serve_folder
from tests.helpers.mask_files import SPACE, write_images_and_masks
from tests.helpers.split_laws import check_partition, check_split, trees_equal
from tuner.config import parsing, plugins
from tuner.config.run import EngineSettings, PluginConfig, Recipe, Run
from tuner.core.types import Batch, StagedModel
from tuner.errors import DataError, SpaceError
from tuner.models import smp as ours
from tuner.models import torchvision_segmentation
from tuner.preprocessing.image_dataset import ImageOptions, resolve_image_spec
from tuner.training.building import build_model, build_task
from tuner.training.devices import DeviceContext, select_device
from tuner.training.model_summary import summarize_model
from tuner.training.optimizers import make_optimizer
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

smp = pytest.importorskip("segmentation_models_pytorch")
timm = pytest.importorskip("timm")
SMALL = "tu-mobilenetv3_small_050"
SMALL_VIT = "tu-test_vit"


def run_of(name: str, weights: str = "none", size: int | None = None) -> Run:
    return Run(
        PluginConfig("segmentation", {}),
        PluginConfig("masks", {"size": size} if size else {}),
        PluginConfig(name, {"weights": weights}),
        Recipe(),
        0,
    )


def built(
    name: str,
    outputs: int = 3,
    weights: str = "none",
    home: Path = Path(),
    size: int | None = None,
) -> StagedModel:
    return build_model(run_of(name, weights, size), home, outputs)


def shaken(staged: StagedModel) -> StagedModel:
    """BatchNorms that do something, so that one left out or doubled is seen."""
    generator = torch.Generator().manual_seed(0)
    for module in staged.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_var):
                assert value is not None
                value.data.uniform_(0.5, 1.5, generator=generator)
    return staged


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


TAPS = {
    "fcn_resnet50": (6, {"c4", "c5"}),
    "deeplabv3_mobilenet_v3_large": (7, {"c3", "c6"}),
    "lraspp_mobilenet_v3_large": (7, {"c3", "c6"}),
    "unet/resnet18": (7, {"f1", "f2", "f3", "f4", "f5"}),
    f"unet/{SMALL}": (9, {"f1", "f2", "f3", "f4", "f5"}),
    f"unetplusplus/{SMALL}": (9, {"f1", "f2", "f3", "f4", "f5"}),
    f"fpn/{SMALL}": (9, {"f2", "f3", "f4", "f5"}),
    f"manet/{SMALL}": (9, {"f1", "f2", "f3", "f4", "f5"}),
    f"linknet/{SMALL}": (9, {"f1", "f2", "f3", "f4", "f5"}),
    f"upernet/{SMALL}": (9, {"f2", "f3", "f4", "f5"}),
    f"pan/{SMALL}": (9, {"f2", "f3", "f4", "f5"}),
    f"pspnet/{SMALL}": (5, {"f3"}),
    "pspnet/resnet18": (5, {"f3"}),
    "pspnet/mobilenet_v2": (5, {"f3"}),
    f"deeplabv3/{SMALL}": (9, {"f5"}),
    f"deeplabv3plus/{SMALL}": (9, {"f2", "f3", "f4", "f5"}),
    f"dpt/{SMALL_VIT}": (9, {"tokens0", "tokens2", "tokens3", "tokens5"}),
    "segformer/mit_b0": (6, {"f2", "f3", "f4", "f5"}),
    "pan/mit_b0": (6, {"f2", "f3", "f4", "f5"}),
    "pspnet/mit_b0": (4, {"f3"}),
    "segformer/resnet18": (7, {"f1", "f2", "f3", "f4", "f5"}),
    "unet/tu-convnext_atto": (6, {"f2", "f3", "f4", "f5"}),
    "unet/mit_b0": (6, {"f2", "f3", "f4", "f5"}),
    "unet/mobilenet_v2": (7, {"f1", "f2", "f3", "f4", "f5"}),
}


@pytest.mark.parametrize(("name", "expected"), TAPS.items())
def test_a_segmenter_is_cut_by_both_laws_and_hands_on_what_later_stages_need(
    name: str, expected: tuple[int, set[str]]
) -> None:
    side = 128 if name.startswith("pan/") else 64
    staged = shaken(built(name, size=side))
    check_partition(staged)
    check_split(staged, images(side))
    count, taps = expected
    assert len(staged.stages) == count
    prefix, _ = staged.split(
        staged.max_depth - ("/" in name)
    )  # all but the heads; all but decoder and head
    x = prefix(images(side))
    assert isinstance(x, dict)
    assert {leaf for leaf in x if leaf not in ("height", "width")} == taps
    logits = staged.as_module().eval()(images(side))
    assert logits.shape == (2, 3, side, side)


def test_each_stage_of_segformers_encoder_has_its_embedding_blocks_and_norm() -> None:
    """In this order, so that freeze depth k freezes the k largest feature maps."""
    staged = built("segformer/mit_b0")
    encoder: Any = staged.model.encoder
    assert list(staged.stages) == ["stage1", "stage2", "stage3", "stage4", "decoder", "head"]
    for i in (1, 2, 3, 4):
        prefix, _ = staged.split(i)
        own = {
            f"{part}{number}"
            for number in range(1, i + 1)
            for part in ("patch_embed", "block", "norm")
        }
        frozen = {
            name.partition(".")[0] for name, p in encoder.named_parameters() if not p.requires_grad
        }
        assert frozen == own and len(list(prefix.parameters())) > 0


def test_what_is_behind_pspnets_feature_map_stays_part_of_the_model_and_is_frozen_first() -> None:
    """smp's PSPNet keeps the stages that it never calls: the weights have smp's own names."""
    staged = built("pspnet/resnet18", 2)
    native = smp.PSPNet("resnet18", encoder_weights=None, classes=2)
    assert list(staged.model.state_dict()) == list(native.state_dict())
    staged.split(1)
    encoder: Any = staged.model.encoder
    frozen = {
        name.partition(".")[0] for name, p in encoder.named_parameters() if not p.requires_grad
    }
    assert frozen == {"conv1", "bn1", "layer3", "layer4"}


def test_an_encoder_that_is_one_stage_says_why() -> None:
    reasons = {name: built(name).uncut_reason for name in ("unet/efficientnet-b0", f"unet/{SMALL}")}
    assert reasons[f"unet/{SMALL}"] is None
    assert "structure of the encoder" in (reasons["unet/efficientnet-b0"] or "")


def test_smps_deeplabv3_and_torchvisions_have_names_of_their_own() -> None:
    families = {
        name: plugins.find_model_family(name)
        for name in ("deeplabv3/resnet50", "deeplabv3plus/resnet50", "deeplabv3_resnet50")
    }
    assert list(families.values()) == ["smp", "smp", "torchvision_segmentation"]


@pytest.mark.parametrize("name", ["segformer/mit_b0", f"dpt/{SMALL_VIT}", "pspnet/resnet18"])
def test_the_stages_are_shown_without_numbers(name: str) -> None:
    """`tuner models` builds on the meta device, whose tensors have sizes alone."""
    summary = summarize_model(name)
    assert [row.stage for row in summary.depths][1:] == list(built(name).stages)[:-1]
    assert summary.flops > 0


# -- sizes


@pytest.mark.parametrize("size", [96, 128])
def test_pan_takes_128_pixels_and_more(size: int) -> None:
    """The rule is true of smp's own model, and is told before a training."""
    spec = ours.input_spec(f"pan/{SMALL}")
    native = built(f"pan/{SMALL}").model.eval()
    if size >= 128:
        assert resolve_image_spec(ImageOptions(size=size), spec).size == size
        assert native(images(size)).shape[-1] == size
        return
    with pytest.raises(SpaceError, match=r"data.size: 96, .* at least 128 pixels; .* write 128"):
        resolve_image_spec(ImageOptions(size=size), spec)
    with pytest.raises(RuntimeError, match="too small"):
        native(images(size))


def test_a_model_made_for_one_size_is_refused_for_another() -> None:
    with pytest.raises(SpaceError, match=r"data.size: 448, .* made for 224 pixels"):
        built("unet/tu-swin_tiny_patch4_window7_224", size=448)


def test_dpt_takes_a_vits_weights_for_images_of_another_size(tmp_path: Path) -> None:
    """Positions are resampled; everything else of the ViT's trunk is as it was given."""
    torch.manual_seed(2)
    vit = timm.create_model("test_vit", pretrained=False, num_classes=7)
    path = saved(tmp_path / "w.safetensors", vit.state_dict())
    staged = built(f"dpt/{SMALL_VIT}", 3, path, size=96)
    assert staged.notes == ("decoder and head: new, the weights are the encoder's",)
    encoder: Any = staged.model.encoder
    given, found = vit.state_dict(), encoder.model.state_dict()
    other = {name for name in found if not name.startswith(("pos_embed", "head."))}
    assert all(torch.equal(found[name], given[name]) for name in other)
    assert found["pos_embed"].shape[1] == 6 * 6 + 1 != given["pos_embed"].shape[1]
    assert staged.model.eval()(images(96)).shape == (2, 3, 96, 96)


def test_every_decoder_has_a_name() -> None:
    """`NAMES` is read without importing the module, so it is written out beside the table."""
    written = tuple(f"{name}/*" for name in ours.ARCHITECTURES)
    assert written == ours.NAMES


ENCODERS = [
    "vgg11",
    "resnet34",
    "efficientnet-b0",
    "mobileone_s0",
    "densenet121",
    "timm-skresnet18",
    "tu-tf_efficientnet_lite0",
    "tu-resnet18",
]


OTHERS = ["se_resnet50", "tu-vgg11", "tu-regnetx_002", "xception", "dpn68", "mit_b0"]
# how an encoder is cut follows from it and its depth, which is 5 for U-Net and 3 for PSPNet; the
# decoders of the others take the same maps as U-Net or fewer
PAIRS = [
    *itertools.product(["unet", "pspnet"], [*ENCODERS, *OTHERS]),
    ("fpn", ENCODERS[0]),
    ("unetplusplus", "mit_b0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "encoder"), PAIRS)
def test_encoders_of_many_kinds_are_cut_by_both_laws(architecture: str, encoder: str) -> None:
    if (architecture, encoder) == ("unetplusplus", "mit_b0"):
        with pytest.raises(SpaceError, match="smp cannot build it"):
            built(f"{architecture}/{encoder}")
        return
    staged = shaken(built(f"{architecture}/{encoder}"))
    check_partition(staged)
    check_split(staged, images())


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision_segmentation.NAMES)
def test_each_of_torchvisions_is_cut_by_both_laws(name: str) -> None:
    staged = shaken(built(name))
    check_partition(staged)
    check_split(staged, images(48))  # not a multiple of the stride: the input's size travels
    whole = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=3,
        **({} if "lraspp" in name else {"aux_loss": True}),
    )
    assert list(staged.model.state_dict()) == list(whole.state_dict())


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_while_training_torchvisions_outputs_are_native_too_and_any_size_passes(name: str) -> None:
    staged = shaken(built(name))
    staged.model.train()
    _, suffix = staged.split(0)
    outputs = []
    for whole in (staged.model, suffix.train()):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(dict(whole(images(50))))
    assert set(outputs[0]) == ({"out"} if "lraspp" in name else {"out", "aux"})
    assert trees_equal(*outputs)


@pytest.mark.slow
def test_fcns_losses_are_those_of_torchvisions_loop() -> None:
    """Three steps of references/segmentation/train.py, and of the task over the stages, from the same weights on the same batches."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8))
        for _ in range(3)
    ]
    batches[0][1][:, :8] = 255
    theirs, mine = [], []
    model = built("fcn_resnet50").model.train()
    groups = [
        {"params": [*model.backbone.parameters(), *model.classifier.parameters()]},
        {"params": model.aux_classifier.parameters(), "lr": 0.01 * 10},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4)
    for step, (image, target) in enumerate(batches):
        torch.manual_seed(step)
        output = model(image)
        losses = {
            name: nn.functional.cross_entropy(x, target.long(), ignore_index=255)
            for name, x in output.items()
        }
        loss = losses["out"] + 0.5 * losses["aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss.detach()))
    staged = built("fcn_resnet50")
    _, net = staged.split(0)
    net.train()
    task = build_task(run_of("fcn_resnet50"), ("a", "b", "c"))
    published = torchvision_segmentation.RECIPES["segmentation"] | {"decay_norms": True}
    optimizer = make_optimizer(net, Recipe(**published))
    for step, (image, target) in enumerate(batches):
        torch.manual_seed(step)
        loss = task.loss(net, Batch(image, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mine.append(float(loss.detach()))
    assert mine == theirs


# -- the laws of freezing


def trained(tmp_path: Path, name: str, depth: int, *words: str) -> Run:
    path = tmp_path / "s.yaml"
    path.write_text(
        SPACE.replace("path: x", f"path: {write_images_and_masks(tmp_path / 'scenes', 12)}")
    )
    return parsing.load_space(
        path, [f"model.name={name}", f"recipe.freeze_depth={depth}", *words]
    ).sample(None, seed=5)


def here(home: Path, cache: str) -> DeviceContext:
    return select_device(EngineSettings.model_validate({"device": "cpu", "cache": cache}), home)


CUTS = [
    (f"unet/{SMALL}", 3),
    (f"fpn/{SMALL}", 8),
    ("segformer/mit_b0", 2),
    ("deeplabv3_mobilenet_v3_large", 4),
    ("lraspp_mobilenet_v3_large", 6),
]


@pytest.mark.parametrize(("name", "depth"), CUTS)
def test_memory_and_stillness(name: str, depth: int, tmp_path: Path) -> None:
    augment = "strong" if name.startswith("lraspp") else "flip"
    r = trained(tmp_path, name, depth, f"data.augment={augment}", "data.views=2")
    epochs = {}
    for cache, kind in (("always", "CachedSource"), ("never", "UncachedSource")):
        bench = prepare_training(r, here(tmp_path / "home", cache), "mean_iou")
        assert type(bench.train).__name__ == kind
        prefix, _ = bench.staged_model.split(depth)
        frozen = {k: v.clone() for k, v in prefix.state_dict().items()}
        moving = {k: v.clone() for k, v in bench.net.state_dict().items()}
        epochs[cache] = [progress.epoch for progress in fit(bench, r.recipe, r.seed)]
        assert all(torch.equal(v, frozen[k]) for k, v in prefix.state_dict().items())
        assert any(not torch.equal(v, moving[k]) for k, v in bench.net.state_dict().items())
    for a, b in zip(epochs["always"], epochs["never"], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
        assert a.scores == pytest.approx(b.scores, abs=0.05)


# -- weights


def saved(path: Path, state: dict[str, Tensor]) -> str:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return str(path)


def test_weights_for_other_classes_renew_the_last_convolutions_alone(tmp_path: Path) -> None:
    given = shaken(built("deeplabv3_mobilenet_v3_large", 4)).model.state_dict()
    path = saved(tmp_path / "w.safetensors", given)
    same = built("deeplabv3_mobilenet_v3_large", 4, path)
    assert same.notes == () and all(
        torch.equal(v, given[k]) for k, v in same.model.state_dict().items()
    )
    other = built("deeplabv3_mobilenet_v3_large", 2, path)
    assert other.notes == (
        "classifier.4 and aux_classifier.4: new, the weights have none for these classes",
    )
    new = {
        k
        for k, v in other.model.state_dict().items()
        if not (v.shape == given[k].shape and torch.equal(v, given[k]))
    }
    assert new == {
        f"{head}.4.{kind}"
        for head in ("classifier", "aux_classifier")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("lraspp_mobilenet_v3_large", "mobilenet_v3_large"), ("fcn_resnet50", "resnet50")],
)
def test_a_classifiers_weights_go_into_the_backbone(
    name: str, backbone: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    given = {
        k.removeprefix("features."): v
        for k, v in get_model(backbone, weights=None).state_dict().items()
    }
    torch.manual_seed(3)
    staged = built(
        name, 3, saved(tmp_path / "w.safetensors", get_model(backbone, weights=None).state_dict())
    )
    assert staged.notes == ("heads: new, the weights are the backbone's",)
    found: Any = staged.model.backbone
    assert all(torch.equal(v, given[k]) for k, v in found.state_dict().items())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "resnet10t"])
def test_timms_weights_go_into_an_encoder_of_the_same_name(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    given = timm.create_model(name, pretrained=False).state_dict()
    staged = built(f"unet/tu-{name}", 3, saved(tmp_path / "w.safetensors", given))
    assert staged.notes == ("decoder and head: new, the weights are the encoder's",)
    encoder: Any = staged.model.encoder
    found = {k: v for k, v in encoder.model.state_dict().items() if v.dim() > 1}
    theirs = {tuple(v.flatten()[:3].tolist()) for v in given.values() if v.dim() > 1}
    assert found and all(tuple(v.flatten()[:3].tolist()) in theirs for v in found.values())


def test_a_whole_models_weights_are_taken_but_for_a_head_of_other_classes(tmp_path: Path) -> None:
    given = shaken(built(f"unet/{SMALL}", 4)).model.state_dict()
    staged = built(f"unet/{SMALL}", 2, saved(tmp_path / "w.safetensors", given))
    assert staged.notes == ("segmentation_head: new, the weights have none for these classes",)
    assert all(
        torch.equal(v, given[k])
        for k, v in staged.model.state_dict().items()
        if not k.startswith("segmentation_head.")
    )


def test_anothers_weights_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", get_model("resnet18", weights=None).state_dict())
    with pytest.raises(DataError, match=r"conv1.weight is missing|another model's weights"):
        built("unet/tu-mobilenetv3_small_050", 3, path)
    with pytest.raises(DataError, match="another model's weights"):
        built("fcn_resnet50", 3, path)


def test_smps_default_weights_are_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = smp.encoders.encoders["mobileone_s0"]["pretrained_settings"]["imagenet"]
    torch.manual_seed(3)
    encoder: Any = built("unet/mobileone_s0").model.encoder
    folder = tmp_path / "hub" / settings["repo_id"] / "resolve" / settings["revision"]
    folder.mkdir(parents=True)
    save_file(encoder.state_dict(), folder / "model.safetensors")
    with serve_folder(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        built("unet/mobileone_s0", 3, "default", tmp_path / "home")
    again: Any = built(
        "unet/mobileone_s0", 3, "default", tmp_path / "home"
    ).model.encoder  # the server is gone
    assert trees_equal(again.state_dict(), encoder.state_dict())
    with pytest.raises(DataError) as error:
        built("unet/resnet18", 3, "default", tmp_path / "home")
    assert f"{address}/smp-hub/resnet18.imagenet/resolve/" in str(error.value)


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        (
            "unet/resnet81",
            "none",
            r"encoder 'resnet81' is not known to smp .*; did you mean 'resnet18'\?",
        ),
        ("unet/tf_efficientnet_lite0", "none", "timm's are called tu-<name>"),
        ("fpn/tu-tf_efficientnet_lite00", "none", "did you mean 'tf_efficientnet_lite0'"),
        ("pan/xception", "none", r"pan dilates .* take pan/resnet34 .* such as fpn/xception"),
        ("deeplabv3/tu-pvt_v2_b0", "none", r"deeplabv3 dilates .* such as fpn/tu-pvt_v2_b0"),
        ("dpt/resnet18", "none", r"take a ViT of timm .* such as upernet/resnet18"),
        ("dpt/tu-test_vit_relpos", "none", r"RelPos and no VisionTransformer of timm; take a ViT"),
        (
            "unet/resnet18",
            "imaginet",
            r"'imaginet' is not known for resnet18; did you mean 'imagenet'\? \(allowed: default, none, imagenet",
        ),
        (
            "fcn_resnet50",
            "COCO",
            r"'COCO' is not known for fcn_resnet50.*allowed: default, backbone, IMAGENET1K_V1",
        ),
    ],
)
def test_unknown_names_get_the_nearest(name: str, weights: str, said: str) -> None:
    with pytest.raises(SpaceError, match=said):
        built(name, 3, weights)


def test_without_the_package_the_way_to_have_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(SpaceError, match=r"pip install 'segmentation-models-pytorch"):
        built("unet/resnet18")


def test_what_the_weights_want() -> None:
    assert ours.input_spec("unet/resnet18").mean == (0.485, 0.456, 0.406)
    assert ours.input_spec("unet/tu-tf_efficientnet_lite0").std == (0.5, 0.5, 0.5)
    swin = ours.input_spec("unet/tu-swin_tiny_patch4_window7_224")
    assert (swin.size, swin.multiple) == (224, 224)
    assert torchvision_segmentation.input_spec("fcn_resnet50").size == 520


# -- exports


def check_exports(
    name: str, formats: str, tuner: Callable[..., CommandResult], folder: Path
) -> None:
    """Every format agrees with the model, and ONNX is read by its runtime alone, for another number of images."""
    import onnxruntime

    (folder / "s.yaml").write_text(
        SPACE.replace("path: x", f"path: {write_images_and_masks(folder / 'scenes', 12)}")
    )
    side = 128 if name.startswith("pan/") else 32
    said = tuner(
        "train",
        "s.yaml",
        f"model.name={name}",
        f"data.size={side}",
        "recipe.epochs=1",
        f"export=[{formats}]",
        "--quiet",
    )
    assert said.code == 0, said.err
    place = folder / "studies" / "s" / "train"
    exports = json.loads((place / "manifest.json").read_text())["exports"]
    assert set(exports) == {"safetensors", *formats.split(",")}
    assert all(export["largest_difference"] < 1e-3 for export in exports.values())
    session = onnxruntime.InferenceSession(
        str(place / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"image": torch.rand(3, 3, side, side).numpy()})
    assert logits.shape == (3, 2, side, side)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lraspp_mobilenet_v3_large",
        f"fpn/{SMALL}",
        "segformer/mit_b0",
        f"deeplabv3plus/{SMALL}",
        f"pan/{SMALL}",
        f"pspnet/{SMALL}",
        f"dpt/{SMALL_VIT}",
    ],
)
def test_what_is_read_back_agrees_and_a_runtime_alone_reads_it(
    name: str, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    formats = "onnx,torch_export" if name.startswith("fpn/") else "onnx"
    check_exports(name, formats, tuner, tmp_path)
