"""What the cut pays for the models of today: an epoch with everything but the head frozen, and tuner's unfrozen epoch beside a bare loop.

    taskset -c 0 python benchmarks/families.py [--only vit swin] [--repeats 3]

One small member of each family, with random weights, on made-up images of 128 pixels or made-up texts of 15 to 60 words. For each
model three trainings take turns, an epoch each, in one process: tuner with nothing frozen and nothing cached, tuner with all stages
but the head frozen and their activations cached before, and a bare loop over the same batches, which are read and normalised before
the clock starts: the library's own model, the same loss, optimizer and validation. Seconds are those of the CPU (`process_time`), so
that what else runs on the core counts little. The first epoch of each is not counted; medians of the others, least to most.
"""

import argparse
import copy
import csv
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers import small_transformers
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.engines import _process_settings
from tuner.preprocessing.tokenization import trim_padding
from tuner.training.devices import select_device
from tuner.training.epoch import TrainingContext, shuffle_into_batches
from tuner.training.optimizers import make_optimizer
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit

_process_settings.keep_freed_memory()

SIDE = 128  # pixels
LENGTH = 128  # tokens
IMAGES = {
    "vit": "timm/vit_tiny_patch16_224",
    "convnext": "timm/convnext_atto",
    "swin": "timm/swin_tiny_patch4_window7_224",
    "regnet": "timm/regnetx_002",
    "resnet": "timm/resnet10t",
    "efficientnet": "timm/tf_efficientnet_lite0",
    "mobilenet": "timm/mobilenetv3_small_050",
    "dinov2": "timm/vit_small_patch14_dinov2",
    "maxvit": "timm/test_maxvit",
    "densenet": "densenet121",
    "ghostnet": "timm/ghostnet_050",
    "hgnet": "timm/hgnetv2_b0",
    "repvgg": "timm/repvgg_a0",
    "mobilevit": "timm/mobilevit_xxs",
    "fastvit": "timm/fastvit_t8",
    "pvt": "timm/pvt_v2_b0",
}
SHAPE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 200}
TEXTS = {
    "modernbert": lambda: transformers.ModernBertConfig(
        **SHAPE,
        intermediate_size=384,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "llama": lambda: transformers.LlamaConfig(
        **SHAPE, intermediate_size=688, max_position_embeddings=256, pad_token_id=0
    ),
    "bert": lambda: transformers.BertConfig(**SHAPE, intermediate_size=1024),
    "electra": lambda: transformers.ElectraConfig(
        **SHAPE, embedding_size=128, intermediate_size=1024
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE, intermediate_size=1024),
    "qwen2": lambda: transformers.Qwen2Config(
        **SHAPE, intermediate_size=688, num_key_value_heads=2, pad_token_id=0
    ),
}


@dataclass(frozen=True)
class Row:
    """CPU seconds of the epochs of one model: unfrozen, frozen, bare."""

    unfrozen: list[float]
    frozen: list[float]
    bare: list[float]

    def format(self, name: str, parameters: int) -> str:
        whole, head, bare = map(statistics.median, (self.unfrozen, self.frozen, self.bare))
        spread = ", ".join(
            f"{min(v):.3g} to {max(v):.3g}" for v in (self.unfrozen, self.frozen, self.bare)
        )
        return (
            f"| {name} | {parameters / 1e6:.1f} M | {whole:.3g} | {head:.3g} | {bare:.3g} | "
            f"1/{whole / head:.0f} | {whole / bare:.3f} | {spread} |"
        )


def make_run(folder: Path, key: str, depth: int, epochs: int, count: int) -> Run:
    """A run on made-up data, with nothing frozen, or all but the head."""
    if key in IMAGES:
        data = f"{{name: synthetic, examples: {count * 10 // 7}, classes: 3, size: {SIDE}}}"
        task, model = "classification", f"{{name: {IMAGES[key]}, weights: none}}"
    else:
        write_texts(folder, key, count * 10 // 7)
        data = f"{{name: text, path: {folder / 'texts.csv'}}}"
        task = "text_classification"
        model = f"{{name: hf/made/{key}, folder: {folder / key}, weights: none, length: {LENGTH}}}"
    text = (
        f"task: {task}\ndata: {data}\nmodel: {model}\nrecipe: {{optimizer: adamw, lr: 1.0e-5, "
        f"epochs: {epochs}, batch_size: 16, head: fresh, freeze_depth: {depth}, clip_norm: null}}\n"
    )
    return parsing.parse_space(yaml_document.parse_document(text, "run.yaml")).sample(None, 0)


def write_texts(folder: Path, key: str, count: int) -> None:
    place = folder / key
    if not place.exists():
        place.mkdir()
        small_transformers.write_tokenizer(place, "bert")
        TEXTS[key]().save_pretrained(place)
    draw = random.Random(0)
    words = " ".join(small_transformers.GOOD + small_transformers.BAD).split()
    with open(folder / "texts.csv", "w", newline="", encoding="utf-8") as file:
        rows = [
            (" ".join(draw.choices(words, k=draw.randint(15, 60))) + f" {i}", str(i % 2))
            for i in range(count)
        ]
        csv.writer(file).writerows([("text", "label"), *rows])


def bare_loop(context: TrainingContext, run: Run) -> Iterator[None]:
    """The epochs by hand: the library's own model over batches that are in memory."""
    staged = copy.deepcopy(context.staged_model)
    staged.model.requires_grad_(True)
    optimizer = make_optimizer(torch.nn.Sequential(staged.model), run.recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    def batches(source: Any, indices: list[torch.Tensor]) -> list[Any]:
        taken = [source.take(index, 0) for index in indices]
        return [(trim_padding(x) if isinstance(x, dict) else x, y) for x, y in taken]

    valid = batches(context.valid, list(torch.arange(len(context.valid)).split(64)))
    for epoch in range(1, run.recipe.epochs + 1):
        train = batches(
            context.train,
            shuffle_into_batches(len(context.train), 16, 0, epoch, context.train.lengths),
        )
        yield  # the clock of the epoch starts here
        staged.model.train()
        total = torch.zeros(())
        for x, y in train:
            loss = F.cross_entropy(staged.reference_output(x), y)  # type: ignore[arg-type]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.detach()
        staged.model.eval()
        with torch.no_grad():
            logits = [staged.reference_output(x) for x, _ in valid]
        float(total), torch.cat(logits).argmax(1)  # type: ignore[arg-type]
        yield


def seconds_of(epochs: Iterator[Any]) -> float:
    start = time.process_time()
    next(epochs)
    return time.process_time() - start


def measure(key: str, repeats: int, count: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = folder / "home"
        plain = select_device(EngineSettings(device="cpu", cache="never"), home)
        cached = select_device(EngineSettings(device="cpu", cache="always"), home)
        run = make_run(folder, key, 0, repeats + 1, count)
        whole = prepare_training(run, plain, "accuracy")
        depth = whole.staged_model.max_depth
        head_run = make_run(folder, key, depth, repeats + 1, count)
        head = prepare_training(head_run, cached, "accuracy")
        for source in (head.train, head.valid):
            source.take(torch.arange(2), 0)  # fills the cache
        bare = bare_loop(whole, run)
        unfrozen, frozen = fit(whole, run.recipe, 0), fit(head, head_run.recipe, 0)
        row = Row([], [], [])
        for _ in range(repeats + 1):
            next(bare)  # reads the batches
            row.bare.append(seconds_of(bare))
            row.unfrozen.append(seconds_of(unfrozen))
            row.frozen.append(seconds_of(frozen))
        counted = Row(row.unfrozen[1:], row.frozen[1:], row.bare[1:])
        parameters = sum(p.numel() for p in whole.staged_model.model.parameters())
        return counted.format(IMAGES.get(key, f"{key}-like, 6 blocks of 256"), parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*IMAGES, *TEXTS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=96, help="training examples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{args.count} training examples, {args.repeats} epochs counted, {platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} core, torch {torch.__version__}"
    )
    print(
        "| model | parameters | unfrozen, CPU s | all but the head frozen, s | bare loop, s | frozen / unfrozen | unfrozen / bare | least to most |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for key in args.only:
        print(measure(key, args.repeats, args.count), flush=True)


if __name__ == "__main__":
    main()
