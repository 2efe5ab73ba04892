"""By its default recipe every family learns from real examples: its loss falls and stays finite, at any freeze depth.

Few small examples and a short schedule: how the trainings begin, not where they lead. A family of another task is one more
row in FAMILIES, and one more source in SOURCES where it needs other data.
"""

import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.conftest import SHARED
from tests.helpers.detector_families import list_detector_families, look_at_few_regions
from tuner.config import parsing, plugins, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import select_device
from tuner.training.preparation import load_run, prepare_training
from tuner.training.training_loop import fit

LITE0 = SHARED / "tf_efficientnet_lite0.safetensors"
# for each source its task, its data section and the archive with its files
SOURCES = {
    "raccoon": ("detection", "{name: voc, path: FOLDER}", "raccoon.tar"),
    "bccd": ("detection", "{name: voc, path: FOLDER}", "bccd.tar"),
    "clothing": ("classification", "{name: folder, path: FOLDER}", "clothing.tar"),
    "signdigits": ("classification", "{name: folder, path: FOLDER}", "signdigits.tar"),
    "humans": (
        "segmentation",
        "{name: masks, path: FOLDER, images: Training_Images, masks: Ground_Truth}",
        "humans.tar",
    ),
}


@dataclass(frozen=True)
class Family:
    """The smallest member of a family, and how little of the data shows that it learns.

    `options` are those of the model section. `regions` are sampled in each image by a second stage: its cost. Where a
    backbone is large, another family with the same head stands for what is cut off: the `shares` are fewer.
    """

    model: str
    size: int = 64  # pixels
    examples: int = 12  # for training, and as many for validation, which are trained on too
    epochs: int = 2
    options: str = "weights: none"
    packages: tuple[str, ...] = ()
    regions: int = 16
    sources: tuple[str, ...] = ("raccoon", "bccd")  # in turn
    shares: tuple[float, ...] = (0.0, 1.0)  # of the deepest freeze depth


DETR = ("transformers",)
YOLO = ("libreyolo", "cv2")
PHOTOGRAPHS = ("clothing", "signdigits")
SMP = ("segmentation_models_pytorch",)
FAMILIES = (
    Family("resnet18_slim", 64, 32, 3, "weights: bundled", sources=PHOTOGRAPHS),
    Family("mobilenet_v3_small", 64, 64, 4, "weights: none", sources=PHOTOGRAPHS, shares=(0.5,)),
    Family(
        "timm/tf_efficientnet_lite0",
        64,
        32,
        3,
        f"weights: {LITE0}",
        packages=("timm",),
        sources=PHOTOGRAPHS,
    ),
    Family(
        "unet/tu-mobilenetv3_small_050",
        64,
        12,
        3,
        packages=SMP,
        sources=("humans",),
        shares=(0.0,),
    ),
    Family("lraspp_mobilenet_v3_large", 64, 12, 3, sources=("humans",), shares=(1.0,)),
    Family(
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        options="weights: none, backbone: none",
        shares=(1.0,),
    ),
    Family("retinanet_resnet50_fpn", options="weights: none, backbone: none", shares=(1.0,)),
    Family("fcos_resnet50_fpn", options="weights: none, backbone: none", shares=(1.0,)),
    Family(
        "ssdlite320_mobilenet_v3_large",
        96,
        12,
        4,
        "weights: none, backbone: none",
        shares=(0.0, 0.5),
    ),
    Family(
        "fasterrcnn/timm/tf_efficientnet_lite0", options=f"backbone: {LITE0}", packages=("timm",)
    ),
    Family(
        "retinanet/timm/tf_efficientnet_lite0",
        options=f"backbone: {LITE0}",
        packages=("timm",),
        shares=(0.5,),
    ),
    Family(
        "fcos/timm/tf_efficientnet_lite0",
        options=f"backbone: {LITE0}",
        packages=("timm",),
        shares=(0.0,),
    ),
    Family("rtdetr_r18", 128, epochs=2, packages=DETR, shares=(0.0,)),
    Family("dfine_n", 256, epochs=3, packages=DETR, shares=(1.0,)),
    Family("yolox_nano", 96, epochs=4, packages=YOLO),
    Family("yolov9_t", 96, epochs=4, packages=YOLO, shares=(0.0,)),
)
CASES = [
    (family, family.sources[number % len(family.sources)], share)
    for family in FAMILIES
    for number, share in enumerate(family.shares)
]


def test_every_family_of_detectors_is_in_the_table() -> None:
    named = {plugins.find_model_family(family.model) for family in FAMILIES}
    assert list_detector_families() <= named


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches, shared by all trainings here."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the archives that were needed so far."""
    return {"": tmp_path_factory.mktemp("sources")}


def extract(source: str, folders: dict[str, Path]) -> Path:
    """The folder with a source's files; skips where its archive is absent."""
    archive_path = SHARED / SOURCES[source][2]
    if not archive_path.exists():
        pytest.skip(f"no {archive_path}")
    if source not in folders:
        folders[source] = folders[""] / source
        with tarfile.open(archive_path) as archive:
            archive.extractall(folders[source], filter="data")
        (folders[source],) = folders[source].iterdir()
    return folders[source]


def make_run(family: Family, source: str, folder: Path) -> Run:
    """The family's default recipe on few small examples."""
    task, data, _ = SOURCES[source]
    text = f"task: {task}\ndata: {data.replace('FOLDER', str(folder))}\nmodel: {{name: {family.model}, {family.options}}}\n"
    words = [
        f"data.size={family.size}",
        f"data.limit={family.examples}",
        f"recipe.epochs={family.epochs}",
        "recipe.fit=train+valid",  # nothing is held out, so nothing is scored
    ]
    document = parsing.apply_overrides(yaml_document.parse_document(text, "descent.yaml"), words)
    return parsing.parse_space(document).sample(None, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "source", "share"),
    [pytest.param(*case, id=f"{case[0].model}-{case[1]}-{case[2]}") for case in CASES],
)
def test_the_loss_falls_and_stays_finite(
    family: Family, source: str, share: float, home: Path, extracted: dict[str, Path]
) -> None:
    for package in family.packages:
        pytest.importorskip(package, exc_type=ImportError)
    if str(LITE0) in family.options and not LITE0.exists():
        pytest.skip(f"no {LITE0}")
    run = make_run(family, source, extract(source, extracted))
    device_context = select_device(EngineSettings.model_validate({"device": "cpu"}), home)
    deepest = load_run(run, device_context, "map").staged_model.max_depth
    recipe = run.recipe.model_copy(update={"freeze_depth": round(share * deepest)})
    torch.manual_seed(0)
    context = prepare_training(replace(run, recipe=recipe), device_context, "map")
    look_at_few_regions(context.staged_model.model, family.regions)
    losses = [progress.epoch.loss for progress in fit(context, recipe, seed=1)]
    assert losses[-1] < losses[0]
