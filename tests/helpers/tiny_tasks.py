"""A tiny training of each task, from files made here, on a device that a test names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import (
    box_files,
    image_tables,
    instance_files,
    mask_files,
    small_transformers,
    tagged_files,
)
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import select_device
from tuner.training.epoch import TrainingContext
from tuner.training.preparation import prepare_training

RECIPE = "recipe: {optimizer: sgd, lr: 0.001, batch_size: 4, epochs: 1, schedule: constant, warmup: 0.0, head: fresh}"


@dataclass(frozen=True)
class TinyTask:
    """A task, its data and model as a space file states them, and what writes its files into a folder."""

    name: str
    metric: str
    space: str
    write: Callable[[Path], object] = lambda folder: None
    packages: tuple[str, ...] = ()

    def make_run(self, folder: Path, *words: str) -> Run:
        """The files are in `folder`, which the space calls FOLDER."""
        for package in self.packages:
            pytest.importorskip(package, exc_type=ImportError)
        if not (folder / "written").exists():
            self.write(folder)
            (folder / "written").touch()
        text = f"task: {self.name}\n{self.space.replace('FOLDER', str(folder))}\n{RECIPE}"
        document = parsing.apply_overrides(yaml_document.parse_document(text, "tiny.yaml"), words)
        return parsing.parse_space(document).sample(None, seed=3)

    def prepare(self, run: Run, home: Path, device: str, **engine: Any) -> TrainingContext:
        settings = EngineSettings.model_validate({"name": "inline", "device": device, **engine})
        return prepare_training(run, select_device(settings, home), self.metric)


def write_bert_and_texts(folder: Path) -> None:
    small_transformers.write_model_folder(folder, "bert")
    small_transformers.write_csv(folder / "texts.csv")


def write_bert_and_names(folder: Path) -> None:
    small_transformers.write_model_folder(folder, "bert")
    tagged_files.write_conll(folder / "names.conll")


def write_bert_and_ratings(folder: Path) -> None:
    """Texts with any number of labels, and with a number."""
    small_transformers.write_model_folder(folder, "bert")
    lines = ["text,labels,stars"]
    for text, _ in small_transformers.make_corpus(60):
        labels = [word for word in ("cold", "fine", "fun") if word in text]
        lines.append(f"{text},{'|'.join(labels)},{len(text)}")
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")


def write_gpt2_and_texts(folder: Path) -> None:
    small_transformers.write_model_folder(folder, "gpt2")
    small_transformers.write_csv(folder / "texts.csv")


TINY_TASKS = {
    task.name: task
    for task in (
        TinyTask(
            "classification",
            "accuracy",
            "data: {name: synthetic, examples: 60, classes: 3, size: 32}\n"
            "model: {name: resnet18_slim, weights: bundled}",
        ),
        TinyTask(
            "detection",
            "map",
            "data: {name: voc, path: FOLDER/voc, size: 64}\n"
            "model: {name: fasterrcnn/timm/mobilenetv3_small_050, backbone: none, regions: 16, "
            "proposals: 16}",
            lambda folder: box_files.write_voc(folder / "voc"),
            ("faster_coco_eval", "timm"),
        ),
        TinyTask(
            "instance_segmentation",
            "mask_map",
            "data: {name: coco, path: FOLDER/instances/instances.json, size: 64}\n"
            "model: {name: maskrcnn/timm/mobilenetv3_small_050, backbone: none, regions: 16, "
            "proposals: 16}",
            lambda folder: instance_files.write_instances(folder / "instances"),
            ("pycocotools", "timm"),
        ),
        TinyTask(
            "segmentation",
            "mean_iou",
            "data: {name: masks, path: FOLDER/masks, size: 64}\n"
            "model: {name: lraspp_mobilenet_v3_large, weights: none}",
            lambda folder: mask_files.write_images_and_masks(folder / "masks", 24),
        ),
        TinyTask(
            "multilabel",
            "mean_average_precision",
            "data: {name: table, path: FOLDER/photos/photos.csv, label: labels, size: 32}\n"
            "model: {name: resnet18_slim, weights: bundled}",
            lambda folder: image_tables.write_table(folder / "photos"),
        ),
        TinyTask(
            "regression",
            "r2",
            "data: {name: table, path: FOLDER/photos/photos.csv, label: [age, height], size: 32}\n"
            "model: {name: resnet18_slim, weights: bundled}",
            lambda folder: image_tables.write_table(folder / "photos"),
        ),
        TinyTask(
            "text_classification",
            "accuracy",
            "data: {name: text, path: FOLDER/texts.csv}\n"
            "model: {name: bert, folder: FOLDER/bert, length: 48}",
            write_bert_and_texts,
            ("transformers",),
        ),
        TinyTask(
            "text_multilabel",
            "mean_average_precision",
            "data: {name: text, path: FOLDER/ratings.csv, label: labels}\n"
            "model: {name: bert, folder: FOLDER/bert, length: 24}",
            write_bert_and_ratings,
            ("transformers",),
        ),
        TinyTask(
            "text_regression",
            "r2",
            "data: {name: text, path: FOLDER/ratings.csv, label: stars}\n"
            "model: {name: bert, folder: FOLDER/bert, length: 24}",
            write_bert_and_ratings,
            ("transformers",),
        ),
        TinyTask(
            "text_generation",
            "negative_log_perplexity",
            "data: {name: text, path: FOLDER/texts.csv, text: text}\n"
            "model: {name: gpt2, folder: FOLDER/gpt2, length: 48}",
            write_gpt2_and_texts,
            ("transformers",),
        ),
        TinyTask(
            "token_classification",
            "entity_f1",
            "data: {name: tagged_text, path: FOLDER/names.conll}\n"
            "model: {name: bert, folder: FOLDER/bert, length: 32}",
            write_bert_and_names,
            ("transformers",),
        ),
    )
}
SLOW_ON_CPU = (
    "detection",
    "instance_segmentation",
    "multilabel",
    "regression",
    "text_classification",
    "text_generation",
    "text_multilabel",
    "text_regression",
    "token_classification",
)


def list_cases(*names: str) -> list[Any]:
    """(task, device): each task on the GPU, where there is one, and on the CPU, so that the test is known to work."""
    cases = []
    for name in names or TINY_TASKS:
        slow = [pytest.mark.slow] if name in SLOW_ON_CPU else []
        cases.append(pytest.param(TINY_TASKS[name], "cpu", marks=slow, id=f"{name}-cpu"))
        cases.append(
            pytest.param(TINY_TASKS[name], "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda")
        )
    return cases
