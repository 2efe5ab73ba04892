"""The rows of the GPU kit that are about one training: epochs, freezing, the other tasks, busy time, checkpoints, memory, precision."""

import statistics
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_data
import gpu_loops
from gpu_measure import (
    Figure,
    Setup,
    clocked,
    compare,
    peak_bytes,
    pixel_bytes,
    profiled_busy_share,
    release,
    reset_peak,
    sampled_busy_share,
    take_turns,
    under_plain_settings,
)

from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, open_checkpoints

LR = 0.01
ENDLESS = 100_000  # epochs: an arm trains as long as it is asked for more
CLASSIFIER = """
task: classification
data: {name: folder, path: x}
model: {name: resnet50, weights: none}
recipe: {optimizer: sgd, lr: 0.01, momentum: 0.9, batchnorm: adapt, schedule: constant, warmup: 0.0, head: fresh}
"""
DETECTOR = """
task: detection
data: {name: voc, path: x}
model: {name: fasterrcnn_resnet50_fpn, weights: none, backbone: none}
recipe: {optimizer: sgd, lr: 0.002, momentum: 0.9, schedule: constant, warmup: 0.0, fit: train+valid}
"""
SEGMENTER = """
task: {name: segmentation, loss: dice}
data: {name: masks, path: x}
model: {name: unet/resnet34, weights: none}
recipe: {optimizer: adam, lr: 0.0002, schedule: constant, warmup: 0.0, fit: train+valid}
"""
TEXTS = """
task: text_classification
data: {name: text, path: x}
model: {name: bert, folder: x, weights: none}
recipe: {optimizer: adamw, lr: 0.00002, clip_norm: 1.0, schedule: constant, warmup: 0.0, fit: train+valid}
"""


def make_run(text: str, words: list[str], seed: int = 1) -> Run:
    document = parsing.apply_overrides(yaml_document.parse_document(text, "the GPU kit"), words)
    return parsing.parse_space(document).sample(None, seed=seed)


def device_context(setup: Setup, **engine: Any) -> DeviceContext:
    return select_device(
        EngineSettings.model_validate({"name": "inline", "device": str(setup.device), **engine}),
        setup.home,
    )


def prepare(setup: Setup, run: Run, metric: str = "accuracy", **engine: Any) -> TrainingContext:
    return prepare_training(run, device_context(setup, **engine), metric)


def epochs(context: TrainingContext, run: Run, setup: Setup) -> Iterator[float]:
    """Seconds of each epoch by tuner, with all that `fit` does in one."""
    return clocked(fit(context, run.recipe, run.seed), setup.device)


def plain(loop: Iterator[None], setup: Setup) -> Iterator[float]:
    """Seconds of each epoch of a plain loop."""
    return clocked(under_plain_settings(loop), setup.device)


# -- a classifier, nothing frozen


def photographs(setup: Setup, size: tuple[int, int]) -> Path:
    """At full size 4,096 training and 512 validation images."""
    counts = setup.pick((4096, 512, 64), (48, 16, 16))
    return gpu_data.write_photographs(setup.folder / f"photographs-{size[0]}", counts, size)


def resnet_run(setup: Setup, size: tuple[int, int], *words: str) -> Run:
    """ResNet-50 at 224 pixels in batches of 128; in miniature the slim ResNet-18 at 32."""
    side, batch = setup.pick(224, 32), setup.pick(128, 16)
    common = [
        f"data.path={photographs(setup, size)}",
        f"data.size={side}",
        f"recipe.batch_size={batch}",
    ]
    model = setup.pick("resnet50", "resnet18_slim")
    return make_run(
        CLASSIFIER, [*common, f"model.name={model}", f"recipe.epochs={ENDLESS}", *words]
    )


def square(setup: Setup) -> tuple[int, int]:
    """Files of the size that the network sees."""
    side = setup.pick(224, 32)
    return side, side


def epoch_row(setup: Setup) -> Iterator[Figure]:
    """Images a second of tuner's epoch against a bare loop over tensors in the device's memory."""
    run = resnet_run(setup, square(setup))
    batch = run.recipe.batch_size
    arms = {
        "tuner": epochs(prepare(setup, run), run, setup),
        "bare": plain(bare_loop(prepare(setup, run), batch), setup),
    }
    yield images_figure(setup, "images/s, tuner ÷ bare loop over tensors in memory", arms, 0.95)


def bare_loop(context: TrainingContext, batch_size: int) -> Iterator[None]:
    train, valid = gpu_loops.read_all(context.train), gpu_loops.read_all(context.valid)
    net, where = gpu_loops.plain_model(context), context.device_context
    return gpu_loops.bare_epochs(net, train, valid, where, batch_size, LR)


def images_figure(setup: Setup, what: str, arms: dict[str, Iterator[float]], goal: float) -> Figure:
    """Images a second of tuner's epoch over those of the other arm."""
    train, valid, _ = setup.pick((4096, 512, 64), (48, 16, 16))
    seconds = take_turns(arms, setup.pick(4, 2))
    tuner, other = ([(train + valid) / s for s in seconds[arm]] for arm in arms)
    return compare(what, tuner, other, goal, "images/s, validation included", at_least=True)


def loader_figure(setup: Setup, size: tuple[int, int], what: str) -> Figure:
    import os

    run = resnet_run(setup, size)
    workers = setup.pick(min(16, len(os.sched_getaffinity(0))), 1)
    batch, folder = run.recipe.batch_size, photographs(setup, size)
    loader = gpu_loops.loader_epochs(prepare(setup, run), folder, batch, LR, workers)
    arms = {"tuner": epochs(prepare(setup, run), run, setup), "loader": plain(loader, setup)}
    return images_figure(setup, f"{what}, {workers} loader processes", arms, 3.0)


def loader_row(setup: Setup) -> Iterator[Figure]:
    """The same against ImageFolder and DataLoader, over files of the network's own size."""
    yield loader_figure(setup, square(setup), "images/s, tuner ÷ ImageFolder + DataLoader")


def photograph_row(setup: Setup) -> Iterator[Figure]:
    """The same over files of 500 x 375 pixels, as photographs of ImageNet have on average."""
    size = setup.pick((500, 375), (60, 45))
    yield loader_figure(setup, size, f"the same over files of {size[0]} x {size[1]} pixels")


# -- freezing


def freeze_row(setup: Setup) -> Iterator[Figure]:
    """An epoch with everything but the head frozen, and half of the stages, against an unfrozen epoch."""
    models = ("resnet50", "timm/vit_base_patch16_224", "timm/convnext_tiny")
    for model in setup.pick(models, ("resnet18_slim",)):
        limit = f"data.limit={setup.pick(2048, 48)}"
        run = resnet_run(setup, square(setup), f"model.name={model}", limit)
        deepest = prepare(setup, run).staged_model.max_depth
        half = deepest // 2
        depths = {"none": 0, "half": half, "all": deepest}
        seconds = take_turns(
            {name: depth_epochs(setup, model, limit, depth) for name, depth in depths.items()}, 3
        )
        ratio = statistics.median(seconds["none"]) / statistics.median(seconds["half"])
        notes = f"depth {half} of {deepest}: 1/{ratio:.1f}"
        name = f"{model}: fully frozen ÷ unfrozen epoch"
        unit = "s an epoch, validation included"
        yield compare(name, seconds["all"], seconds["none"], 1 / 50, unit, notes=notes)
        release()


def depth_epochs(setup: Setup, model: str, limit: str, depth: int) -> Iterator[float]:
    """Seconds of the epochs at a depth; the first one fills the cache."""
    words = (f"model.name={model}", limit, f"recipe.freeze_depth={depth}")
    run = resnet_run(setup, square(setup), *words)
    return epochs(prepare(setup, run), run, setup)


# -- the other tasks


def task_figure(
    setup: Setup, name: str, run: Run, metric: str, loop: Iterator[None], context: TrainingContext
) -> Figure:
    arms = {"tuner": epochs(context, run, setup), "library": plain(loop, setup)}
    seconds = take_turns(arms, setup.pick(3, 1), warmup=setup.pick(1, 0))
    what = f"{name}: training pass, tuner ÷ the library's own loop"
    return compare(
        what, seconds["tuner"], seconds["library"], 1.0, f"s for {len(context.train)} examples"
    )


def boxes(setup: Setup, side: int) -> Path:
    """In miniature few images: detectors are slow on a CPU."""
    return gpu_data.write_boxes(setup.folder / f"boxes-{side}", setup.pick(160, 8), side)


def detector_run(setup: Setup, model: str, side: int, batch: int, *words: str) -> Run:
    common = [f"data.path={boxes(setup, side)}", f"data.size={side}", f"model={model}"]
    return make_run(
        DETECTOR, [*common, f"recipe.batch_size={batch}", f"recipe.epochs={ENDLESS}", *words]
    )


def faster_rcnn_row(setup: Setup) -> Iterator[Figure]:
    """Against the loop of torchvision's references/detection."""
    slim = "{name: fasterrcnn_mobilenet_v3_large_320_fpn, weights: none, backbone: none}"
    model = setup.pick("{name: fasterrcnn_resnet50_fpn, weights: none, backbone: none}", slim)
    run = detector_run(setup, model, setup.pick(512, 64), setup.pick(8, 4))
    context, other = (prepare(setup, run, "map") for _ in range(2))
    loop = gpu_loops.torchvision_epochs(other, run.recipe.batch_size, run.recipe.lr)
    yield task_figure(setup, "Faster R-CNN", run, "map", loop, context)


def rtdetr_row(setup: Setup) -> Iterator[Figure]:
    """Against a loop over transformers' own forward pass and loss."""
    model = setup.pick("{name: rtdetr_r50, weights: none}", "{name: rtdetr_r18, weights: none}")
    clip, lr = 0.1, 1e-4
    words = [
        "recipe.optimizer=adamw",
        f"recipe.lr={lr}",
        f"recipe.clip_norm={clip}",
        "recipe.ema=0",
    ]
    run = detector_run(setup, model, setup.pick(640, 128), setup.pick(16, 4), *words)
    context, other = (prepare(setup, run, "map") for _ in range(2))
    loop = gpu_loops.rtdetr_epochs(other, run.recipe.batch_size, lr, clip)
    yield task_figure(setup, "RT-DETR", run, "map", loop, context)


def unet_row(setup: Setup) -> Iterator[Figure]:
    """Against the loop of the examples of segmentation_models_pytorch."""
    side, batch = setup.pick(256, 32), setup.pick(16, 4)
    folder = gpu_data.write_masks(setup.folder / "masks", setup.pick(512, 12), side)
    name = setup.pick("unet/resnet34", "unet/tu-mobilenetv3_small_050")
    words = [f"data.path={folder}", f"data.size={side}", f"model.name={name}"]
    run = make_run(SEGMENTER, [*words, f"recipe.batch_size={batch}", f"recipe.epochs={ENDLESS}"])
    context, other = (prepare(setup, run, "mean_iou") for _ in range(2))
    loop = gpu_loops.unet_epochs(other, batch, run.recipe.lr)
    yield task_figure(setup, "U-Net", run, "mean_iou", loop, context)


TINY_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert_row(setup: Setup) -> Iterator[Figure]:
    """Against a loop as that of transformers' Trainer."""
    words, batch = setup.pick(2000, 50), setup.pick(32, 8)
    longest = setup.pick(110, 20)
    file = gpu_data.write_texts(setup.folder / "texts.csv", setup.pick(2000, 40), words, longest)
    folder = gpu_data.write_bert(setup.folder / "bert", words, **setup.pick({}, TINY_BERT))
    place = [f"data.path={file}", f"model.folder={folder}", f"model.length={setup.pick(128, 32)}"]
    run = make_run(TEXTS, [*place, f"recipe.batch_size={batch}", f"recipe.epochs={ENDLESS}"])
    context, other = (prepare(setup, run) for _ in range(2))
    clip = run.recipe.clip_norm or 1.0
    loop = gpu_loops.bert_epochs(other, batch, run.recipe.lr, clip)
    yield task_figure(setup, "BERT-base", run, "accuracy", loop, context)


# -- what the device does meanwhile


def busy_row(setup: Setup) -> Iterator[Figure]:
    """The share of an unfrozen epoch in which the device computes."""
    run = resnet_run(setup, square(setup))
    training = fit(prepare(setup, run), run.recipe, run.seed)
    next(training)
    shares = [profiled_busy_share(training, setup.device)]
    by = f"profiler {shares[0]:.3f}"
    sampled = sampled_busy_share(training, setup.device, setup.pick(4, 1))
    if sampled is not None:
        shares, by = [sampled], f"NVML {sampled:.3f}, {by}"
    what = "busy share of an unfrozen epoch, validation included"
    yield Figure(what, shares[0], 0.95, "share of the time", shares, [1.0], at_least=True, notes=by)


def checkpoint_row(setup: Setup) -> Iterator[Figure]:
    """The share of a training's time that its checkpoints take: with them against without."""
    number = setup.pick(4, 2)
    words = (f"recipe.epochs={number}", "recipe.optimizer=adamw", "recipe.lr=0.001")
    run = resnet_run(setup, square(setup), *words)
    with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
        arms = {
            "with": clocked(trainings(setup, run, Path(folder)), setup.device),
            "without": clocked(trainings(setup, run, None), setup.device),
        }
        seconds = take_turns(arms, setup.pick(2, 1))
    middle = {arm: statistics.median(found) for arm, found in seconds.items()}
    share = 1 - middle["without"] / middle["with"]
    what = f"share of the time in checkpoints, AdamW, {number} epochs"
    yield Figure(what, share, 0.05, "s a training", seconds["with"], seconds["without"])


def trainings(setup: Setup, run: Run, folder: Path | None) -> Iterator[None]:
    """Whole trainings, each from the same weights; with a folder, its checkpoints are written there."""
    context = prepare(setup, run)
    start = {name: value.clone() for name, value in context.net.state_dict().items()}
    while True:
        context.net.load_state_dict(start)
        deque(fit(context, run.recipe, run.seed, open_checkpoints(run, context, folder)), maxlen=0)
        yield
        for path in folder.iterdir() if folder else ():
            path.unlink()


def memory_row(setup: Setup) -> Iterator[Figure]:
    """The peak of an unfrozen epoch against the bare loop's, each without the data that it keeps there."""
    run = resnet_run(setup, square(setup))
    loop = fit(prepare(setup, run), run.recipe, run.seed)
    tuner = second_peak(setup, loop) - pixel_bytes(setup.device)
    del loop
    release()
    context = prepare(setup, run)
    train, valid = gpu_loops.read_all(context.train), gpu_loops.read_all(context.valid)
    net, where = gpu_loops.plain_model(context), context.device_context
    loop = gpu_loops.bare_epochs(net, train, valid, where, run.recipe.batch_size, LR)
    bare = second_peak(setup, loop)
    bare -= pixel_bytes(setup.device) + sum(tensor.nbytes for tensor in (*train, *valid))
    what = "peak memory of an unfrozen epoch, tuner ÷ bare loop, kept data aside"
    yield compare(what, [tuner / 2**20], [bare / 2**20], 1.1, "MiB")


def second_peak(setup: Setup, loop: Iterator[Any]) -> int:
    """The bytes of a loop's peak in its second epoch."""
    loop = under_plain_settings(loop)
    next(loop)
    reset_peak(setup.device)
    next(loop)
    return peak_bytes(setup.device)
