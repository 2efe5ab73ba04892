"""RT-DETR and D-FINE: cut by both laws, losses and objects as transformers itself computes them, weights, exports."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.detector_training import (
    BOXES,
    LABELS,
    SIDE,
    make_context,
    make_model_input,
    make_targets,
    randomize_weights,
    train_two_epochs,
)
from tests.helpers.http_server import serve_folder
from tests.helpers.split_laws import check_partition, check_split
from tuner.config import plugins
from tuner.core.detectors import NO_OBJECT, join_targets
from tuner.core.export_module import ExportModule
from tuner.core.types import StagedModel
from tuner.errors import DataError, SpaceError
from tuner.models import _detr, dfine, rtdetr

transformers = pytest.importorskip("transformers")
REAL: dict[str, Any] = {name: family for family in (rtdetr, dfine) for name in family.NAMES}
SMALLEST = {"rtdetr_r18": 128, "dfine_n": 256}  # the smallest canvas that each takes
TINY = ("rtdetr", "dfine")
REST = {
    "encoder_in_channels": [16, 32, 64],
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 20,
    "num_denoising": 8,
}


def made(name: str, outputs: int = 3, weights: str = "none", home: Path = Path()) -> StagedModel:
    """A model by name, or one of the two families that is small enough to be computed here."""
    torch.manual_seed(0)
    if name in REAL:
        staged: StagedModel = REAL[name].build(home, name, "detection", outputs, weights=weights)
        return staged
    if name == "rtdetr":
        backbone = transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_indices=[2, 3, 4],
        )
        kind, config = (
            transformers.RTDetrForObjectDetection,
            transformers.RTDetrConfig(backbone_config=backbone, num_labels=outputs, **REST),
        )
    else:
        backbone = transformers.HGNetV2Config(
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64],
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8, 16, 32],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[8, 16, 32, 64],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            use_learnable_affine_block=True,
            out_indices=[2, 3, 4],
        )
        kind, config = (
            transformers.DFineForObjectDetection,
            transformers.DFineConfig(backbone_config=backbone, num_labels=outputs, **REST),
        )
    return _detr.build_detr(home, name, kind, config, f"owner/{name}", weights)


# -- the laws


@pytest.mark.parametrize("name", TINY)
def test_cut(name: str) -> None:
    check_split(randomize_weights(made(name)), make_model_input(_detr.INPUT_SPEC))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), SMALLEST.items())
def test_cut_of_the_smallest_published(name: str, side: int) -> None:
    check_split(randomize_weights(made(name)), make_model_input(REAL[name].input_spec(name), side))


@pytest.mark.parametrize("name", [*TINY, *REAL])
def test_partition(name: str) -> None:
    with torch.device("meta"):
        staged = made(name)
        check_partition(staged)
    assert list(staged.stages) == ["stem", "stage1", "stage2", "stage3", "stage4", "neck", "head"]


@pytest.mark.parametrize(("name", "depth"), [("rtdetr", 3), ("rtdetr", 6), ("dfine", 6)])
def test_stillness_and_memory(name: str, depth: int, tmp_path: Path) -> None:
    found = {}
    for mode in ("always", "never"):
        staged = made(name)
        prefix, _ = staged.split(depth)
        before = {k: v.clone() for k, v in prefix.state_dict().items()}
        moving = {k: v.clone() for k, v in staged.stages["head"].state_dict().items()}
        b = make_context(staged, _detr.INPUT_SPEC, depth, tmp_path, mode)
        assert type(b.train).__name__ == {"always": "CachedSource", "never": "UncachedSource"}[mode]
        found[mode] = train_two_epochs(b, lr=1e-4)
        assert all(torch.equal(v, before[k]) for k, v in prefix.state_dict().items())
        assert any(
            not torch.equal(v, moving[k]) for k, v in staged.stages["head"].state_dict().items()
        )
    for (loss, score), (loss_again, score_again) in zip(
        found["always"], found["never"], strict=True
    ):
        assert loss == pytest.approx(loss_again, rel=1e-2) and score == pytest.approx(
            score_again, rel=1e-2
        )


# -- the library's own losses and objects


def labels_of_the_library() -> list[dict[str, Tensor]]:
    """What transformers' image processor makes of the truth: boxes around their centres, as shares of the image."""
    found = []
    for boxes, labels in zip(BOXES / SIDE, LABELS, strict=True):
        real = labels != NO_OBJECT
        b = boxes[real]
        found.append(
            {
                "class_labels": labels[real],
                "boxes": torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1),
            }
        )
    return found


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("rtdetr", SIDE),
        ("dfine", SIDE),
        *(pytest.param(*i, marks=pytest.mark.slow) for i in SMALLEST.items()),
    ],
)
def test_losses_gradients_and_statistics_are_the_librarys_own(name: str, side: int) -> None:
    staged, x = made(name), make_model_input(_detr.INPUT_SPEC, side)
    model: Any = copy.deepcopy(staged.model).train()
    torch.manual_seed(7)  # noise for the queries that are to be cleaned
    native = model(x, labels=labels_of_the_library())
    native.loss.backward()
    suffix = staged.split(0)[1].train()
    torch.manual_seed(7)
    losses = suffix(join_targets(x, make_targets(side)))
    sum(losses.values()).backward()
    assert any("_dn_" in key for key in losses) and any("_aux_" in key for key in losses)
    assert {k: v.item() for k, v in losses.items()} == {
        k: pytest.approx(v.item(), rel=1e-5) for k, v in native.loss_dict.items()
    }
    assert sum(losses.values()).item() == pytest.approx(native.loss.item(), rel=1e-6)
    for (key, ours), (_, theirs) in zip(
        staged.model.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None), key
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6), (
            key
        )
    moved = model.state_dict()
    assert all(torch.equal(v, moved[k]) for k, v in staged.model.state_dict().items())


@pytest.mark.parametrize("name", TINY)
def test_objects_are_those_of_the_librarys_own_postprocessing(name: str) -> None:
    staged, x = randomize_weights(made(name)), make_model_input(_detr.INPUT_SPEC)
    model: Any = staged.model.eval()

    with torch.no_grad():
        found = staged.as_module()(x)
        process = transformers.RTDetrImageProcessor().post_process_object_detection
        native = process(model(x), threshold=-1.0, target_sizes=[(SIDE, SIDE)] * len(x))
    for i, one in enumerate(
        native
    ):  # its best 20, one for each query; here are all 60 pairs of query and class
        assert torch.equal(found["scores"][i, :20], one["scores"])
        assert torch.equal(found["labels"][i, :20], one["labels"])
        assert torch.allclose(found["boxes"][i, :20], one["boxes"].clamp(0, SIDE), atol=1e-3)
        assert (found["labels"][i] != NO_OBJECT).sum() == 60


def test_a_batch_without_objects_has_a_loss() -> None:
    none = {"boxes": torch.zeros(2, 1, 4), "labels": torch.full((2, 1), NO_OBJECT)}
    losses = (
        made("rtdetr")
        .split(0)[1]
        .train()(join_targets(make_model_input(_detr.INPUT_SPEC)[:2], none))
    )
    total = sum(losses.values())
    assert total > 0 and bool(total.isfinite())
    total.backward()


@pytest.mark.parametrize(("name", "least"), SMALLEST.items())
@pytest.mark.parametrize(("side", "nearest"), [(32, None), (300, 288)])
def test_a_canvas_with_too_few_places_or_a_remainder_is_refused(
    name: str, least: int, side: int, nearest: int | None
) -> None:
    said = rf"^data.size: {side}, but {name} takes multiples of 32 from {least} on; nearest: {nearest or least}$"
    with pytest.raises(SpaceError, match=said):
        made(name).split(0)[1].eval()(torch.zeros(1, 3, side, side))


# -- weights


@pytest.mark.parametrize("name", TINY)
def test_weights_by_path_and_by_folder(name: str, tmp_path: Path) -> None:
    staged = randomize_weights(made(name))
    state = staged.model.state_dict()
    save(staged, tmp_path / "folder" / "model.safetensors")
    save(staged, tmp_path / "own.safetensors")
    for path in (tmp_path / "folder", tmp_path / "own.safetensors"):
        same = made(name, 3, str(path))
        assert same.notes == () and all(
            torch.equal(v, state[k]) for k, v in same.model.state_dict().items()
        )
        other = made(name, 5, str(path))
        assert other.notes == ("classes: new, the weights have none for these",)
        found = other.model.state_dict()
        kept = [k for k in state if "class_embed" not in k and "enc_score_head" not in k]
        assert len(kept) > 200 and all(torch.equal(found[k], state[k]) for k in kept)


def save(staged: StagedModel, path: Path) -> None:
    """As an export has it: the normalisation beside the weights, and no two that share memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.clone() for k, v in staged.model.state_dict().items()}
        | {"tuner.mean": torch.zeros(1, 3, 1, 1)},
        path,
    )


@pytest.mark.parametrize("name", TINY)
def test_default_weights_come_from_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = randomize_weights(made(name, 80))
    save(given, tmp_path / "hub" / "owner" / name / "resolve" / "main" / "model.safetensors")
    with serve_folder(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        staged = made(name, 80, "default", tmp_path / "home")
    assert staged.notes == (
        "classes: new, the weights have none for these",
    )  # 80 of one's own are not COCO's
    key = "model.enc_bbox_head.layers.0.weight"
    assert torch.equal(staged.model.state_dict()[key], given.model.state_dict()[key])
    made(name, 3, "default", tmp_path / "home")  # the server is gone
    with pytest.raises(
        DataError,
        match=f"cannot download {address}/owner/{name}/resolve/main/model.safetensors: .*place it at",
    ):
        made(name, 3, "default", tmp_path / "another")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("rtdetr_r18", "PekingU/rtdetr_r18vd"),
        ("rtdetr_r101", "PekingU/rtdetr_r101vd"),
        ("dfine_n", "ustc-community/dfine-nano-coco"),
    ],
)
def test_published_weights_are_asked_for_by_their_name(
    name: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_folder(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", server)
        with pytest.raises(
            DataError, match=f"cannot download {server}/{address}/resolve/main/model.safetensors"
        ):
            made(name, 3, "default", tmp_path / "home")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SpaceError,
        match=r"^model.weights: 'own.pth': default, none, a .safetensors file, or a folder with",
    ):
        made("rtdetr", 3, "own.pth")
    save(made("dfine"), tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="these are another model's weights, or damaged"):
        made("rtdetr", 3, str(tmp_path / "other.safetensors"))
    with pytest.raises(DataError, match="these are another model's weights"):
        made("dfine_n", 3, str(tmp_path / "other.safetensors"))
    broken = made("rtdetr")
    broken.model.state_dict()["model.enc_output.0.weight"][0, 0] = math.nan
    save(broken, tmp_path / "nan.safetensors")
    with pytest.raises(DataError, match=r"model.enc_output.0.weight holds NaN"):
        made("rtdetr", 3, str(tmp_path / "nan.safetensors"))
    with pytest.raises(DataError, match="does not exist"):
        made("rtdetr", 3, str(tmp_path))  # a folder without weights


def test_without_transformers_the_way_to_have_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SpaceError, match=r"pip install 'transformers"):
        made("rtdetr_r18")


def test_what_the_authors_do_not_train_is_no_parameter() -> None:
    staged = made("dfine")
    assert {"model.decoder.reg_scale", "model.decoder.up"} <= set(
        dict(staged.model.named_buffers())
    ) & set(staged.model.state_dict())


# -- exports


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "safetensors") for name in TINY),
        # D-FINE has RT-DETR's encoder and decoder, and more
        pytest.param("rtdetr", "torch_export", marks=pytest.mark.slow),
        pytest.param("dfine", "onnx", marks=pytest.mark.slow),
    ],
)
def test_what_is_read_back_finds_the_same_objects(name: str, kind: str, tmp_path: Path) -> None:
    model = ExportModule(randomize_weights(made(name)), _detr.INPUT_SPEC).eval()
    assert (
        kind in {"rtdetr": rtdetr, "dfine": dfine}[name].EXPORTS
        and not model.staged[0].exports_batched
    )
    export = plugins.import_plugin("export", kind)
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        export.save(model, x, tmp_path / export.FILE)
        again = export.load(
            tmp_path / export.FILE, lambda: ExportModule(made(name), _detr.INPUT_SPEC)
        )
        other = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        for image in (x, other):
            expected, got = model(image), again(image)
            assert (
                torch.equal(expected["labels"], got["labels"])
                and (expected["labels"] != NO_OBJECT).sum() == 60
            )
            assert torch.allclose(expected["scores"], got["scores"], atol=1e-4)
            assert torch.allclose(expected["boxes"], got["boxes"], atol=1e-2)
