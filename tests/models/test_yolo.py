"""YOLOX and YOLOv9: cut by both laws, losses and objects as libreyolo itself computes them, weights, exports."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import CommandResult
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
from tuner.core.detectors import MAX_OBJECTS, NO_OBJECT, join_targets
from tuner.core.export_module import ExportModule
from tuner.core.types import StagedModel
from tuner.errors import DataError, SpaceError
from tuner.models import _yolo, yolov9, yolox

pytest.importorskip("libreyolo")
pytest.importorskip(
    "cv2",
    exc_type=ImportError,
    reason="libreyolo loads OpenCV, which lacks a system library here (libGL or glib)",
)
SMALLEST = {"yolox_nano": yolox, "yolov9_t": yolov9}
EVERY = {name: family for family in (yolox, yolov9) for name in family.NAMES}


def made(name: str, outputs: int = 3, weights: str = "none", home: Path = Path()) -> StagedModel:
    torch.manual_seed(0)
    staged: StagedModel = EVERY[name].build(home, name, "detection", outputs, weights=weights)
    return staged


# -- the laws


@pytest.mark.parametrize("name", SMALLEST)
def test_cut(name: str) -> None:
    check_split(randomize_weights(made(name)), make_model_input(EVERY[name].input_spec(name)))


@pytest.mark.parametrize("name", EVERY)
def test_partition(name: str) -> None:
    with torch.device("meta"):
        staged = made(name)
        check_partition(staged)
    assert list(staged.stages)[0::5] == ["stem", "neck"] and len(staged.stages) == 7


@pytest.mark.parametrize(("name", "depth"), [("yolox_nano", 3), ("yolov9_t", 6)])
def test_stillness_and_memory(name: str, depth: int, tmp_path: Path) -> None:
    found = {}
    for mode in ("always", "never"):
        staged = made(name)
        prefix, _ = staged.split(depth)
        before = {k: v.clone() for k, v in prefix.state_dict().items()}
        moving = {k: v.clone() for k, v in list(staged.stages.values())[-1].state_dict().items()}
        b = make_context(staged, EVERY[name].input_spec(name), depth, tmp_path, mode)
        assert type(b.train).__name__ == {"always": "CachedSource", "never": "UncachedSource"}[mode]
        found[mode] = train_two_epochs(b, lr=0.001)
        assert all(torch.equal(v, before[k]) for k, v in prefix.state_dict().items())
        assert any(
            not torch.equal(v, moving[k])
            for k, v in list(staged.stages.values())[-1].state_dict().items()
        )
    for (loss, score), (loss_again, score_again) in zip(
        found["always"], found["never"], strict=True
    ):
        assert loss == pytest.approx(loss_again, rel=1e-3) and score == pytest.approx(
            score_again, rel=1e-3
        )


# -- the library's own losses and objects


def centres(boxes: Tensor) -> Tensor:
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def libreyolos_own(
    name: str, state: dict[str, Tensor]
) -> tuple[Any, Callable[[Tensor], Tensor], Tensor]:
    """The library's model with these weights, what it does to pixels in RGB, and the truth as its loader gives it."""
    real = (LABELS != NO_OBJECT)[..., None]
    if name == "yolox_nano":
        from libreyolo.models.yolox.nn import LibreYOLOXModel

        model = LibreYOLOXModel("n", nb_classes=3)
        labels = torch.cat([LABELS[..., None].float(), centres(BOXES)], -1) * real
    else:
        from libreyolo.models.yolo9.nn import LibreYOLO9Model

        model = LibreYOLO9Model("t", nb_classes=3)
        labels = torch.cat([LABELS[..., None].float(), BOXES / SIDE], -1)
    model.load_state_dict(state)
    return model, (lambda x: x[:, [2, 1, 0]]) if name == "yolox_nano" else (lambda x: x), labels


@pytest.mark.parametrize("name", SMALLEST)
def test_losses_gradients_and_statistics_are_the_librarys_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[str] = []  # the reserve of the GPU's memory, by whom
    turn = "libreyolo"
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(turn))
    staged, x = made(name), make_model_input(EVERY[name].input_spec(name))
    model, order, labels = libreyolos_own(name, staged.model.state_dict())
    native = model.train()(order(x), targets=labels)
    native["total_loss"].backward()
    turn = "tuner"
    losses = staged.split(0)[1].train()(join_targets(x, make_targets()))
    assert given_back == (["libreyolo"] * 3 if name == "yolox_nano" else [])  # for each image
    torch.cuda.empty_cache()
    assert given_back.pop() == "tuner"
    total = sum(losses.values())
    total.backward()
    assert total.item() == pytest.approx(native["total_loss"].item(), rel=1e-6)
    assert {k: v.item() for k, v in losses.items()} == {
        k: pytest.approx(native[k].item(), rel=1e-6) for k in losses
    }
    assert len(losses) == 3 and all(v > 0 for v in losses.values())
    moved = model.state_dict()
    for (key, ours), (_, theirs) in zip(
        staged.model.named_parameters(), model.named_parameters(), strict=True
    ):
        assert ours.grad is not None and torch.allclose(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6
        ), key
    assert all(
        torch.equal(v, moved[k]) for k, v in staged.model.state_dict().items()
    )  # BatchNorm's statistics moved alike


@pytest.mark.parametrize("name", SMALLEST)
def test_objects_are_those_of_the_librarys_own_postprocessing(name: str) -> None:
    staged, x = randomize_weights(made(name)), make_model_input(EVERY[name].input_spec(name))
    model, order, _ = libreyolos_own(name, staged.model.state_dict())
    staged.model.eval()
    with torch.no_grad():
        found = staged.as_module()(x)
        outputs = model.eval()(order(x))
    for i in range(len(x)):
        if name == "yolox_nano":
            from libreyolo.postprocess.yolox import postprocess

            one: Any = [level[i : i + 1].clone() for level in outputs]
        else:
            from libreyolo.postprocess.yolo9 import postprocess

            one = {"predictions": outputs["predictions"][i : i + 1]}
        overlap = EVERY[name].MAX_OVERLAP
        native = postprocess(
            one,
            conf_thres=0.001,
            iou_thres=overlap,
            input_size=SIDE,
            original_size=(SIDE, SIDE),
            max_det=MAX_OBJECTS,
        )
        count = native["num_detections"]
        assert 1 < count == int((found["labels"][i] != NO_OBJECT).sum())
        assert found["labels"][i, :count].tolist() == native["classes"]
        assert found["scores"][i, :count].tolist() == pytest.approx(native["scores"], rel=1e-5)
        assert torch.allclose(found["boxes"][i, :count], torch.tensor(native["boxes"]), atol=1e-3)
        assert found["scores"][i, count:].abs().sum() == found["boxes"][i, count:].abs().sum() == 0


def test_boxes_of_different_classes_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.0], [0.0, 0.0005]])
    found = _yolo.best_objects(boxes, scores, 0.5)
    assert found["labels"].tolist() == [0, 1, NO_OBJECT, NO_OBJECT, NO_OBJECT, NO_OBJECT]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8, 0, 0, 0, 0])
    assert (
        found["boxes"][:2].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10]]
        and found["boxes"][2:].sum() == 0
    )


@pytest.mark.parametrize("name", SMALLEST)
def test_a_batch_without_objects_has_a_loss(name: str) -> None:
    none = {"boxes": torch.zeros(2, 1, 4), "labels": torch.full((2, 1), NO_OBJECT)}
    losses = (
        made(name)
        .split(0)[1]
        .train()(join_targets(make_model_input(EVERY[name].input_spec(name))[:2], none))
    )
    total = sum(losses.values())
    assert total > 0
    total.backward()


def test_yolox_takes_0_to_255_and_yolov9_0_to_1() -> None:
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    sizes = {"yolox_tiny": 416, "yolox_s": 640, "yolov9_c": 640}
    for name, size in sizes.items():
        wanted = EVERY[name].input_spec(name)
        assert (wanted.size, wanted.fit) == (size, "letterbox")
        x = wanted.to_model_input(white, torch.device("cpu"))
        assert torch.allclose(x, torch.full_like(x, 255.0 if "yolox" in name else 1.0))


@pytest.mark.parametrize("name", SMALLEST)
def test_a_canvas_that_does_not_halve_five_times_is_refused(name: str) -> None:
    with pytest.raises(
        SpaceError,
        match=rf"^data.size: 72, but {name} takes multiples of 32 from 32 on; nearest: 64$",
    ):
        made(name).split(0)[1].eval()(torch.zeros(1, 3, 72, 72))


# -- weights


@pytest.mark.parametrize(
    ("name", "head"), [("yolox_nano", "head.cls_preds"), ("yolov9_t", "head.cv3")]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_by_path(name: str, head: str, suffix: str, tmp_path: Path) -> None:
    state = randomize_weights(made(name)).model.state_dict()
    path = tmp_path / f"own{suffix}"
    published = {
        "model": state,
        "schema_version": "1.0",
        "names": {0: "raccoon"},
        "nc": 3,
    }  # as libreyolo writes it
    save_file(state, path) if suffix == ".safetensors" else torch.save(published, path)
    same = made(name, 3, str(path))
    assert same.notes == () and all(
        torch.equal(v, state[k]) for k, v in same.model.state_dict().items()
    )
    other = made(name, 5, str(path))
    assert other.notes == (f"{head}: new, the weights have none for these classes",)
    taken = {
        k
        for k, v in other.model.state_dict().items()
        if v.shape == state[k].shape and torch.equal(v, state[k])
    }
    assert {k for k in state if not k.startswith(f"{head}.")} <= taken


@pytest.mark.parametrize(
    ("name", "published"), [("yolox_nano", "LibreYOLOXn"), ("yolov9_t", "LibreYOLO9t")]
)
def test_default_weights_come_from_where_the_library_publishes_them(
    name: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = randomize_weights(made(name, 80)).model.state_dict()
    place = tmp_path / "hub" / "LibreYOLO" / published / "resolve" / "main" / f"{published}.pt"
    place.parent.mkdir(parents=True)
    auxiliary = (
        {"aux.spp.bn.weight": torch.ones(2)} if name == "yolov9_t" else {}
    )  # trains, and is not part of the network
    torch.save({"model": state | auxiliary, "size": "n"}, place)
    with serve_folder(tmp_path / "hub") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        staged = made(name, 3, "default", tmp_path / "home")
    (note,) = staged.notes
    assert note.endswith("new, the weights have none for these classes")
    key = next(k for k in state if k.startswith("backbone.") and state[k].dim() == 4)
    assert torch.equal(staged.model.state_dict()[key], state[key])
    made(name, 3, "default", tmp_path / "home")  # the server is gone
    with pytest.raises(
        DataError,
        match=f"cannot download {address}/LibreYOLO/{published}/resolve/main/{published}.pt: .*place it at",
    ):
        made(name, 3, "default", tmp_path / "another")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SpaceError, match=r"^model.weights: 'coco' is not known for YOLO; default, none, or a path"
    ):
        made("yolox_nano", 3, "coco")
    path = tmp_path / "own.safetensors"
    save_file(made("yolox_nano").model.state_dict(), path)
    with pytest.raises(DataError, match="these are another model's weights"):
        made("yolox_tiny", 3, str(path))


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("libreyolo", r"pip install 'libreyolo"),
        ("cv2", "pip uninstall opencv-python"),
    ],
)
def test_a_missing_package_names_the_command(
    missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.split(".")[0] == "libreyolo"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SpaceError, match=said):
        made("yolox_nano")


# -- exports, and the model as a table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("yolox_nano", "safetensors"),
        pytest.param("yolox_nano", "torch_export", marks=pytest.mark.slow),
        ("yolov9_t", "safetensors"),
        pytest.param("yolov9_t", "onnx", marks=pytest.mark.slow),
    ],
)
def test_what_is_read_back_finds_the_same_objects(name: str, kind: str, tmp_path: Path) -> None:
    wanted = EVERY[name].input_spec(name)
    model = ExportModule(randomize_weights(made(name)), wanted).eval()
    assert kind in EVERY[name].EXPORTS and not model.staged[0].exports_batched
    export, path = plugins.import_plugin("export", kind), tmp_path / "model"
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        export.save(model, x, path.with_name(export.FILE))
        again = export.load(path.with_name(export.FILE), lambda: ExportModule(made(name), wanted))
        other = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        for image in (x, other):
            expected, got = model(image), again(image)
            assert (
                torch.equal(expected["labels"], got["labels"])
                and (expected["labels"] != NO_OBJECT).sum() > 1
            )
            assert torch.allclose(expected["scores"], got["scores"], atol=1e-4)
            assert torch.allclose(expected["boxes"], got["boxes"], atol=1e-2)


def test_the_command_describes_it(tuner: Callable[..., CommandResult]) -> None:
    said = tuner("models", "yolox_nano")
    assert said.code == 0, said.err
    assert said.out.startswith("yolox_nano: ") and "416 x 416" in said.out.splitlines()[0]
    assert [line.split()[1] for line in said.out.splitlines()[3:]] == [
        "stem",
        "dark2",
        "dark3",
        "dark4",
        "dark5",
        "neck",
    ]


def test_the_network_is_the_librarys() -> None:
    staged = made("yolox_nano")
    inside = {
        type(m).__module__
        for m in staged.model.modules()
        if not type(m).__module__.startswith("torch.")
    }
    assert inside == {"libreyolo.models.yolox.nn", "libreyolo.models.yolox.loss"}
    assert isinstance(staged.model, nn.Module) and list(staged.stages) == [
        "stem",
        "dark2",
        "dark3",
        "dark4",
        "dark5",
        "neck",
        "head",
    ]
