"""Checkpoints: two epochs and two more are four, to the bit; damaged ones and others' are left aside; parts of a batch are the batch."""

import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import SMALL, limit_file_size
from tests.helpers import box_files, counting_model, small_transformers
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, PluginConfig, Run
from tuner.core.module_digests import module_digest
from tuner.errors import StorageError
from tuner.files import checkpoint_files
from tuner.files.atomic import file_sha256
from tuner.messages import Epoch
from tuner.training import checkpoints, training_loop
from tuner.training.checkpoints import Checkpoints
from tuner.training.cross_validation import fit_folds, prepare_folds
from tuner.training.devices import DeviceContext, select_device
from tuner.training.micro_batches import initial_micro_batch_size
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import BestEpoch, fit, open_checkpoints

VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "cosine": {"schedule": "cosine", "warmup": 0.3},
    "patience": {"patience": 2, "lr": 1e-5},
    "frozen": {"freeze_depth": 1, "clip_norm": 1.0},
    "both": {"fit": "train+valid", "schedule": "linear"},
    "groups": {"optimizer": "adamw", "weight_decay": 0.01, "layer_decay": 0.7, "head_lr": 2.0},
    "onecycle": {"optimizer": "adamw", "schedule": "onecycle", "warmup": 2, "accumulate": 2},
    "unfreezing": {"optimizer": "adamw", "unfreeze_every": 1, "weight_decay": 0.1},
    **{name: {"optimizer": name, "lr": 1e-3} for name in ("nadam", "adafactor", "rmsprop")},
    "ema": {"ema": 0.9},
    "ema both": {"ema": 0.9, "fit": "train+valid"},
    "everything": {
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "layer_decay": 0.7,
        "head_lr": 2.0,
        "unfreeze_every": 1,
        "schedule": "onecycle",
        "accumulate": 2,
        "clip_norm": 0.5,
        "ema": 0.9,
        "mixup": 0.2,
        "cutmix": 1.0,
        "class_weights": "effective_number",
        "sampling": "balanced",
        "focal_gamma": 2.0,
        "label_smoothing": 0.1,
        "augment": "strong",
    },
}


@pytest.fixture(autouse=True)
def _each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MIN_WRITE_SECONDS", 0.0)


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path / "home")


def run(
    seed: int = 3, model: str = "tests.helpers.counting_model:build_counted_model", **recipe: Any
) -> Run:
    space = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))
    chosen = {
        "epochs": 4,
        "lr": 0.02,
        "freeze_depth": 0,
        "optimizer": "sgd",
        "momentum": 0.9,
        "head": "fresh",
    } | recipe
    found = space.make_run(
        {("data" if k == "augment" else "recipe", k): v for k, v in chosen.items()}, seed=seed
    )
    return replace(found, model=PluginConfig(model, {})) if ":" in model else found


def attempt(
    r: Run,
    here: DeviceContext,
    folder: Path | None,
    most: int | None = None,
    metric: str = "accuracy",
) -> tuple[list[Any], list[str], BestEpoch | None, list[str]]:
    """Epochs, the SHA-256 of the weights after each and at the end, the best, and what was said; given up after `most` epochs."""
    bench = prepare_training(r, here, metric)
    best: BestEpoch | None = None
    kept = open_checkpoints(r, bench, folder)
    told, digests, notes = [], [], []
    for progress in islice(fit(bench, r.recipe, r.seed, kept), most):
        epoch, best = progress.epoch, progress.best
        told.append((epoch.number, epoch.loss, epoch.scores, epoch.temperature))
        digests.append(module_digest(bench.net))
        notes += epoch.notes
    return told, [*digests, module_digest(bench.net)], best, notes


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of each epoch that is really trained."""
    numbers: list[int] = []
    real = training_loop.train_one_epoch

    def learn(*words: Any) -> float:
        numbers.append(words[-1])
        return real(*words)

    monkeypatch.setattr(training_loop, "train_one_epoch", learn)
    return numbers


# -- going on


@pytest.mark.parametrize("name", VARIANTS)
def test_two_epochs_and_the_rest_are_all_of_them_to_the_bit(
    name: str, here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run(**VARIANTS[name])
    straight, digests, best, _ = attempt(r, here, None)
    attempt(r, here, tmp_path / "kept", most=2)
    counted = trained(tmp_path, monkeypatch)
    again, continued, found, notes = attempt(r, here, tmp_path / "kept")
    assert again == straight and notes == []
    assert continued[2:] == digests[2:]  # after the third epoch, and after each that follows
    assert counted == list(range(3, len(straight) + 1)) and len(counted) == (
        1 if name == "patience" else 2
    )
    assert (best is None) == (found is None) == ("fit" in VARIANTS[name])
    if best is None or found is None:
        return
    assert found.epoch.number == best.epoch.number and len(best.predictions) > 0
    assert len(found.predictions) == len(best.predictions) and all(
        torch.equal(a, b)
        for (a, _), (b, _) in zip(found.predictions, best.predictions, strict=True)
    )


def test_an_attempt_killed_when_all_was_trained_trains_nothing_more(
    here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _, best, _ = attempt(run(), here, tmp_path / "kept", most=4)
    counted = trained(tmp_path, monkeypatch)
    again, continued, found, _ = attempt(run(), here, tmp_path / "kept")
    assert again == straight and counted == []
    assert found is not None and best is not None and found.epoch == best.epoch
    assert (
        continued[-1] == attempt(run(), here, None)[1][-1]
    )  # the best epoch's weights, which are not the last's


def test_the_best_epochs_weights_survive_worse_ones(
    here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.tasks.classification import Classification

    ends = []
    for folder, most in ((None, None), (tmp_path / "kept", 3), (tmp_path / "kept", None)):
        scripted = iter([0.1, 0.9, 0.3, 0.2] if most != None or folder is None else [0.2])  # noqa: E711
        monkeypatch.setattr(
            Classification, "score", lambda self, pairs, s=scripted: {"accuracy": next(s)}
        )
        ends.append(attempt(run(), here, folder, most))
    (_, digests, best, _), _, (_, continued, found, _) = ends
    assert best is not None and found is not None and best.epoch.number == found.epoch.number == 2
    assert continued[-1] == digests[-1] == digests[1] != digests[2]


def test_a_trial_stopped_while_it_remembers_shows_nothing_of_a_later_epoch(
    here: DeviceContext, tmp_path: Path
) -> None:
    attempt(run(), here, tmp_path / "kept", most=3)
    told, _, best, _ = attempt(run(), here, tmp_path / "kept", most=1)
    assert len(told) == 1 and best is not None and best.epoch.number == 1
    held = json.loads(
        json.dumps(
            checkpoints.read_header(
                checkpoint_files.list_checkpoints(tmp_path / "kept")[0].read_bytes()
            )
        )
    )["best"]
    assert (best.predictions == []) == (held != 1)


@pytest.mark.parametrize("after", [(2, 2), (2, 1)])
def test_folds_continue_in_step(
    after: tuple[int, int], here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two epochs, or when the second fold was an epoch behind."""
    whole = run(epochs=3)
    r = replace(whole, data=PluginConfig(whole.data.name, {**whole.data.options, "folds": 2}))

    def epochs(folder: Path | None, most: int | None = None) -> list[Any]:
        training = fit_folds(r, prepare_folds(r, here, "accuracy"), folder)
        return [
            (
                progress.epoch.number,
                progress.epoch.loss,
                progress.epoch.scores,
                progress.epoch.temperature,
            )
            for progress in islice(training, most)
        ]

    straight = epochs(None)
    assert all(temperature > 0 for *_, temperature in straight)
    epochs(tmp_path / "kept", most=2)
    if after == (2, 1):
        checkpoint_files.list_checkpoints(tmp_path / "kept" / "fold-1")[0].unlink()
    counted = trained(tmp_path, monkeypatch)
    assert epochs(tmp_path / "kept") == straight
    assert counted == ([3, 3] if after == (2, 2) else [2, 3, 3])


def test_every_random_state_follows_the_seed_and_the_epoch(here: DeviceContext) -> None:
    """A model that draws by Python, numpy and torch trains alike whatever its process drew before."""
    import random

    import numpy as np

    first = attempt(run(), here, None)
    for draw in (random.random, np.random.rand, torch.rand(()).uniform_):
        draw()
        assert attempt(run(), here, None)[:2] == first[:2]


def goes_on(text: str, metric: str, here: DeviceContext, kept: Path) -> None:
    """One epoch and the rest are all of them to the bit."""
    r = parsing.parse_space(yaml_document.parse_document(text, "run.yaml")).sample(None, seed=2)
    straight = attempt(r, here, None, metric=metric)
    attempt(r, here, kept, most=1, metric=metric)
    again = attempt(r, here, kept, metric=metric)
    assert again[0] == straight[0] and again[1][1:] == straight[1][1:] and again[3] == []


def test_augmented_and_mixed_images_go_on(here: DeviceContext, tmp_path: Path) -> None:
    text = "task: classification\nmodel: {name: resnet18_slim, weights: none}\n"
    text += "data: {name: synthetic, examples: 60, size: 32, augment: strong}\n"
    text += "recipe: {freeze_depth: 0, epochs: 3, batch_size: 16, mixup: 0.4, cutmix: 1.0}\n"
    goes_on(text, "accuracy", here, tmp_path / "kept")


@pytest.mark.slow
def test_a_detector_goes_on(here: DeviceContext, tmp_path: Path) -> None:
    root = box_files.write_voc(tmp_path / "voc")
    text = (
        f"task: detection\ndata: {{name: voc, path: {root}, size: 64, augment: flip, views: 2}}\n"
    )
    text += "model: {name: ssdlite320_mobilenet_v3_large, weights: none, backbone: none}\n"
    text += "recipe: {optimizer: adamw, lr: 0.001, freeze_depth: 3, epochs: 3, batch_size: 8}\n"
    goes_on(text, "map", here, tmp_path / "kept")


@pytest.mark.slow
def test_texts_go_on_with_embeddings_that_are_the_head_too(
    here: DeviceContext, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    small_transformers.write_model_folder(tmp_path, "gpt2")
    small_transformers.write_csv(tmp_path / "messages.csv")
    text = f"task: text_generation\ndata: {{name: text, path: {tmp_path / 'messages.csv'}}}\n"
    text += f"model: {{name: gpt2, folder: {tmp_path / 'gpt2'}, length: 24}}\n"
    text += "recipe: {optimizer: adamw, lr: 0.001, freeze_depth: 0, epochs: 3, batch_size: 8, schedule: cosine}\n"
    goes_on(text, "negative_log_perplexity", here, tmp_path / "kept")


# -- what is written


def test_two_generations_stay_the_newest_and_the_last_that_was_synced(
    here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run(), here, None)  # fills the caches
    synced: list[str] = []
    monkeypatch.setattr("tuner.files.atomic.fsync", lambda path: synced.append(path.name))

    def there(name: str) -> list[int]:
        return [
            int(p.name.partition("-")[0])
            for p in checkpoint_files.list_checkpoints(tmp_path / name)
        ]

    monkeypatch.setattr(checkpoints, "SYNC_SECONDS", 0.0)
    attempt(run(), here, tmp_path / "each", most=3)
    assert there("each") == [3, 2]
    assert synced.count("each") == 3 and len(synced) == 6  # each file, then its folder
    synced.clear()
    monkeypatch.setattr(checkpoints, "SYNC_SECONDS", 1e9)
    attempt(run(), here, tmp_path / "none", most=3)
    assert synced == [] and there("none") == [3, 1]
    clock = iter([0.0, *[now for now in (0.4, 0.8, 1.2, 1.6) for _ in range(2)]])
    monkeypatch.setattr(checkpoints, "SYNC_SECONDS", 1.0)
    bench = prepare_training(run(), here, "accuracy")
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(clock))
    kept = open_checkpoints(run(), bench, tmp_path / "some")
    assert kept is not None
    training = checkpoints.TrainingState(bench.net, *state_of(bench.net))
    for number in range(1, 5):
        kept.save_if_due(training, [Epoch(n, 0.5, {}, 0.1) for n in range(1, number + 1)], 0, {})
    assert there("some") == [4, 3] and synced[1:] == ["some"]


def state_of(net: nn.Module) -> tuple[Any, Any, Any]:
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    return (
        opt,
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0),
        initial_micro_batch_size(net, 16),
    )


def test_a_file_says_what_it_is_and_its_name_vouches_for_it(
    here: DeviceContext, tmp_path: Path
) -> None:
    import tuner

    attempt(run(), here, tmp_path / "kept", most=1)
    (path,) = (tmp_path / "kept").iterdir()
    assert path.name == f"000001-{file_sha256(path)}.safetensors"
    about = checkpoints.read_header(path.read_bytes())
    assert (about["format"], about["tuner"], about["torch"]) == (
        2,
        tuner.__version__,
        torch.__version__,
    ) and len(about["run"]) == 64


def test_short_epochs_are_not_written_one_by_one(
    here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MIN_WRITE_SECONDS", 1e9)
    attempt(run(), here, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_optimizers_memory_lies_as_before(here: DeviceContext, tmp_path: Path) -> None:
    """Convolutions train with their channels last; so does their momentum, after a checkpoint too."""
    bench = prepare_training(run(), here, "accuracy")
    weight = bench.net[0][0].weight
    for value in (torch.randn(weight.shape), torch.tensor(3.0)):
        found = checkpoints.match_memory_layout(weight, value)
        assert torch.equal(found, value) and not found.requires_grad
        assert found.shape != weight.shape or found.stride() == weight.stride()


def test_weights_in_two_places_are_written(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    path = Checkpoints(tmp_path / "kept", "key").write_file(
        "000001", dict(net.state_dict()), {}, sync=True
    )
    assert checkpoint_files.read_verified(path) is not None


# -- what is left aside


def spoil(content: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "flipped":
        return (
            content[: len(content) // 2]
            + bytes([content[len(content) // 2] ^ 1])
            + content[len(content) // 2 + 1 :]
        )
    if how == "zeroed":
        return bytes(len(content))
    return content[: int(how)]


@pytest.mark.parametrize("how", ["empty", "flipped", "zeroed", "100", "4096"])
def test_30_a_damaged_checkpoint_gives_way_to_the_one_before(
    how: str, here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = attempt(run(), here, None)
    monkeypatch.setattr(checkpoints, "SYNC_SECONDS", 0.0)
    attempt(run(), here, tmp_path / "kept", most=3)
    newest = checkpoint_files.list_checkpoints(tmp_path / "kept")[0]
    newest.write_bytes(spoil(newest.read_bytes(), how))
    counted = trained(tmp_path, monkeypatch)
    told, digests, _, notes = attempt(run(), here, tmp_path / "kept")
    assert told == straight[0] and digests[-2:] == straight[1][-2:] and counted == [3, 4]
    assert notes == [
        f"{newest}: damaged (its SHA-256 is not that of its name); left aside; going on from epoch 2"
    ]


@pytest.mark.slow
def test_30_a_checkpoint_cut_anywhere_is_noticed(here: DeviceContext, tmp_path: Path) -> None:
    attempt(run(), here, tmp_path / "kept", most=1)
    (path,) = checkpoint_files.list_checkpoints(tmp_path / "kept")
    content = path.read_bytes()
    for end in [*range(0, len(content), 4096), len(content) - 1]:
        path.write_bytes(content[:end])
        assert checkpoint_files.read_verified(path) is None
    for place_ in range(0, len(content), 1021):
        path.write_bytes(content[:place_] + bytes([content[place_] ^ 1]) + content[place_ + 1 :])
        assert checkpoint_files.read_verified(path) is None
    path.write_bytes(content)
    assert checkpoint_files.read_verified(path) == content


def test_30_with_both_damaged_the_training_begins_again(
    here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SYNC_SECONDS", 0.0)
    straight = attempt(run(), here, tmp_path / "kept", most=3)
    for path in checkpoint_files.list_checkpoints(tmp_path / "kept"):
        path.write_bytes(b"")
    counted = trained(tmp_path, monkeypatch)
    told, _, _, notes = attempt(run(), here, tmp_path / "kept", most=3)
    assert told == straight[0] and counted == [1, 2, 3]
    assert len(notes) == 2 and all(
        note.endswith("left aside; the training begins again") for note in notes
    )


def renamed(path: Path, change: dict[str, Any]) -> None:
    """The checkpoint with another header, under the name that this has."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["checkpoint"] = json.dumps(
        json.loads(header["__metadata__"]["checkpoint"]) | change
    )
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + content[8 + size :]
    path.unlink()
    (path.parent / checkpoint_files.checkpoint_name("000002", changed)).write_bytes(changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3, "tuner": "9.0"}, "written by tuner 9.0 in another format"),
        ({"run": "0" * 64}, "of another run, or of other data"),
    ],
)
def test_30_a_checkpoint_of_a_newer_tuner_or_another_run_is_never_taken(
    change: dict[str, Any], said: str, here: DeviceContext, tmp_path: Path
) -> None:
    straight = attempt(run(), here, tmp_path / "kept", most=2)
    renamed(checkpoint_files.list_checkpoints(tmp_path / "kept")[0], change)
    for path in checkpoint_files.list_checkpoints(tmp_path / "kept")[1:]:
        path.unlink()
    told, digests, _, notes = attempt(run(), here, tmp_path / "kept", most=2)
    assert told == straight[0] and digests == straight[1]
    assert len(notes) == 1 and said in notes[0]


@pytest.mark.parametrize("other", [{"seed": 4}, {"lr": 0.03}, {"freeze_depth": 1}, {"epochs": 5}])
def test_30_runs_that_differ_in_anything_share_no_checkpoint(
    other: dict[str, Any], here: DeviceContext, tmp_path: Path
) -> None:
    attempt(run(), here, tmp_path / "kept", most=2)
    alone = attempt(run(**other), here, None)
    found = attempt(run(**other), here, tmp_path / "kept")
    assert found[:2] == alone[:2] and "of another run" in found[3][0]


def test_30_a_model_that_has_changed_begins_again(
    here: DeviceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run(), here, tmp_path / "kept", most=2)
    wider = nn.Sequential(nn.Flatten(), counting_model.CountedModule(), nn.Linear(3 * 32 * 32, 3))
    monkeypatch.setattr(counting_model, "build_counted_model", lambda outputs: wider)
    monkeypatch.setattr("tuner.training.building._cached_models", {})
    told, _, _, notes = attempt(run(), here, tmp_path / "kept", most=1)
    assert [number for number, *_ in told] == [
        1
    ] and "of another model; left aside; the training begins again" in notes[0]


def test_what_has_no_digest_in_its_name_is_not_looked_at(
    here: DeviceContext, tmp_path: Path
) -> None:
    attempt(run(), here, tmp_path / "kept", most=2)
    (path, *_) = checkpoint_files.list_checkpoints(tmp_path / "kept")
    path.rename(path.with_name("000002.safetensors"))
    (tmp_path / "kept" / ".half_123.tmp").write_bytes(b"half")
    assert attempt(run(), here, tmp_path / "kept", most=1)[3] == []
    assert not (tmp_path / "kept" / ".half_123.tmp").exists()  # what a killed write left goes


def test_26_a_full_disk_is_named_with_the_need_and_leaves_no_half_file(
    here: DeviceContext, tmp_path: Path
) -> None:
    kept = Checkpoints(tmp_path / "kept", "key")
    with pytest.raises(StorageError) as error, limit_file_size(5000):
        kept.write_file("000001", {"a": torch.zeros(1_000_000)}, {}, sync=True)
    assert f"disk full while writing {tmp_path}/kept/000001-" in str(
        error.value
    ) and "(4 MB needed: File too large)" in str(error.value)
    assert os.listdir(tmp_path / "kept") == []


# -- memory


class Greedy(nn.Module):
    """Runs out of memory when it is given more than `most` examples to train on."""

    most = 5
    asked: list[int] = []  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.asked.append(len(x))
            if len(x) > self.most:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} examples")
        return x


def greedy(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), Greedy(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, outputs)
    )


def by_hand(r: Run, here: DeviceContext, most: int) -> list[Any]:
    """The same training, each batch accumulated in parts of four by hand."""
    from tuner.training.epoch import predict_source, shuffle_into_batches
    from tuner.training.optimizers import lr_factor, make_optimizer

    bench = prepare_training(r, here, "accuracy")
    opt = make_optimizer(bench.net, r.recipe)
    steps = r.recipe.epochs * len(
        shuffle_into_batches(len(bench.train), r.recipe.batch_size, r.seed, 1)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: lr_factor(r.recipe, step, steps))
    told = []
    for number in range(1, r.recipe.epochs + 1):
        total = 0.0
        for index in shuffle_into_batches(len(bench.train), r.recipe.batch_size, r.seed, number):
            opt.zero_grad()
            bench.net.train()
            for part in torch.tensor_split(index, -(-len(index) // most)):
                batch = bench.train.take(part, 0)
                (
                    nn.functional.cross_entropy(bench.net(batch.x), batch.y, reduction="sum")
                    / len(index)
                ).backward()
                with torch.no_grad():
                    total += float(
                        nn.functional.cross_entropy(bench.net(batch.x), batch.y, reduction="sum")
                    )
            opt.step()
            schedule.step()
        told.append(
            (total / len(bench.train), bench.task.score(predict_source(bench, bench.valid, 4)))
        )
    return told


def test_what_does_not_fit_is_accumulated_and_means_the_same(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    r = run(
        model="tests.training.test_checkpoints:greedy", lr=0.01, epochs=2, schedule="cosine"
    )  # batches of 16: 17, 8 and 4 are tried
    monkeypatch.setattr(Greedy, "asked", [])
    told, _, _, notes = attempt(r, here, None)
    assert (
        Greedy.asked[:2] == [16, 8] and max(Greedy.asked[2:]) == 4
    )  # learnt once, kept for the whole trial
    assert notes == [
        "out of memory with 16 examples at once; batches go on in parts of 8, their gradients added up",
        "out of memory with 8 examples at once; batches go on in parts of 4, their gradients added up",
    ]
    monkeypatch.setattr(Greedy, "most", 99)
    for (_, loss, scores, _), (expected, of_hand) in zip(told, by_hand(r, here, 4), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert scores["log_likelihood"] == pytest.approx(of_hand["log_likelihood"], rel=1e-5)
    whole = attempt(r, here, None)[0]
    assert [loss for _, loss, *_ in told] == pytest.approx(
        [loss for _, loss, *_ in whole], rel=1e-4
    )  # as if all had fitted


@pytest.mark.slow
def test_a_continued_trial_knows_how_much_fits(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    r = run(model="tests.training.test_checkpoints:greedy", lr=0.01, epochs=3)
    straight = attempt(r, here, None)
    attempt(r, here, tmp_path / "kept", most=1)
    monkeypatch.setattr(Greedy, "asked", [])
    told, digests, _, notes = attempt(r, here, tmp_path / "kept")
    assert told == straight[0] and digests[1:] == straight[1][1:]
    assert max(Greedy.asked) == 4 and notes == []


def test_a_trial_that_was_killed_for_its_memory_goes_on_with_parts_of_its_batches(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Greedy, "most", 99)
    r = run(model="tests.training.test_checkpoints:greedy", lr=0.01, epochs=3)
    straight = attempt(r, here, None)[0]
    attempt(r, here, tmp_path / "kept", most=1)  # and then its worker was killed
    monkeypatch.setattr(Greedy, "asked", [])
    told, _, _, notes = attempt(r, replace(here, micro_batches=4), tmp_path / "kept")
    assert max(Greedy.asked) == 4 and [number for number, *_ in told] == [1, 2, 3]
    assert [loss for _, loss, *_ in told] == pytest.approx([loss for _, loss, *_ in straight], 1e-4)
    assert len(notes) == 1 and "batches are taken in parts of 4" in notes[0]


@pytest.mark.slow
@pytest.mark.parametrize(("normed", "least"), [(False, 1), (True, 2)])
def test_where_nothing_fits_the_trial_ends_as_out_of_memory(
    normed: bool, least: int, here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.messages import Assignment
    from tuner.training import worker_jobs

    monkeypatch.setattr(Greedy, "most", 0)
    monkeypatch.setattr(Greedy, "asked", [])
    monkeypatch.setattr("tuner.training.building._cached_models", {})
    if normed:
        monkeypatch.setattr(
            "tests.training.test_checkpoints.greedy",
            lambda outputs: nn.Sequential(
                nn.Flatten(),
                Greedy(),
                nn.Linear(3072, 16),
                nn.BatchNorm1d(16),
                nn.Linear(16, outputs),
            ),
        )
    r = run(model="tests.training.test_checkpoints:greedy")
    result = worker_jobs.run_trial(
        Assignment(r, "accuracy", EngineSettings(device="cpu"), str(here.home)),
        lambda epoch: True,
        0,
    )
    assert (result.state, result.epochs) == ("oom", ()) and "out of memory" in result.reason
    assert min(Greedy.asked) == least and Greedy.asked == sorted(Greedy.asked, reverse=True)


def test_an_error_that_is_not_of_memory_is_not_tried_again(
    here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Greedy, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Greedy, "forward", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        attempt(run(model="tests.training.test_checkpoints:greedy"), here, None)


# -- which files stay


def test_only_the_best_keep_their_weights(tmp_path: Path) -> None:
    found = checkpoint_files.CheckpointRetention(tmp_path, 2)
    for draw in range(5):
        folder = tmp_path / str(draw) / "fold-0"
        folder.mkdir(parents=True)
        for what in ("000003", "best"):
            (
                folder.parent / checkpoint_files.checkpoint_name(what, str(draw).encode())
            ).write_bytes(str(draw).encode())

    def there() -> dict[str, list[str]]:
        return {
            p.name: sorted(q.name.partition("-")[0] for q in p.iterdir())
            for p in sorted(tmp_path.iterdir())
        }

    found.on_trial_end(0, (-0.5, 3, 0))
    assert there()["0"] == ["best"]
    found.on_trial_end(1)  # pruned, or failed for good
    found.on_trial_end(2, (-0.7, 3, 2))
    found.on_trial_end(3, (-0.6, 3, 3))
    assert there() == {
        "2": ["best"],
        "3": ["best"],
        "4": ["000003", "best", "fold"],
    }  # 0 fell out of the best; 4 is to go on
    again = checkpoint_files.CheckpointRetention(tmp_path, 1)
    again.take_over({0: (-0.5, 3, 0), 1: None, 2: (-0.7, 3, 2), 3: (-0.6, 3, 3)})
    assert there() == {"2": ["best"], "4": ["000003", "best", "fold"]}
    none = checkpoint_files.CheckpointRetention(tmp_path, 0)
    none.take_over({})
    none.on_trial_end(4, (-0.9, 1, 4))
    assert list(there()) == ["2"]
