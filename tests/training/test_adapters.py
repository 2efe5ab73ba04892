"""Adapters: they begin where the model stands, train alone with the head, are all that a checkpoint holds, and are merged in exports."""

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from tests.conftest import CommandResult
from tests.helpers import small_transformers
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Run
from tuner.core.adapters import MARK, trained_parameters
from tuner.core.module_digests import module_digest
from tuner.errors import SpaceError
from tuner.files.checkpoint_files import list_checkpoints
from tuner.messages import Assignment, Ingredient
from tuner.training import building, checkpoint_content, checkpoints, soup
from tuner.training.adapters import merge_adapters
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext, predict_source
from tuner.training.optimizers import make_optimizer
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import copy_state, fit, open_checkpoints

pytest.importorskip("peft")
pytest.importorskip("transformers")

DIGITS = """
task: classification
data: {name: digits, size: 32}
model: {name: timm/test_vit, weights: none}
recipe: {optimizer: adamw, lr: 1.0e-3, epochs: 2, batch_size: 64, lora: {rank: 4}}
"""


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path / "home")


def text_run(
    folder: Path, kind: str = "bert", task: str = "text_classification", **recipe: Any
) -> Run:
    """A run on small texts with adapters of rank 4, unless `recipe` says something else."""
    if not (folder / kind).exists():
        small_transformers.write_model_folder(folder, kind)
    small_transformers.write_csv(folder / "messages.csv")
    text = (
        f"task: {task}\ndata: {{name: text, path: {folder / 'messages.csv'}}}\n"
        f"model: {{name: {kind}, folder: {folder / kind}, length: 24, dropout: 0.0}}\n"
        "recipe: {lr: 1.0e-3, epochs: 2, head: fresh}\n"
    )
    space = parsing.parse_space(yaml_document.parse_document(text, "texts.yaml"))
    chosen: dict[Any, Any] = {("recipe", "lora", "rank"): 4}
    chosen |= {("recipe", *key.split("__")): value for key, value in recipe.items()}
    values = {path: value for path, value in space.values.items() if path != ("recipe", "lora")}
    return replace(space, values=values).make_run(chosen, seed=1)


def outputs(context: TrainingContext) -> torch.Tensor:
    return torch.cat([prediction for prediction, _ in predict_source(context, context.valid, 32)])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_adapters_begin_where_the_model_stands_and_leave_its_layers(
    kind: str, tmp_path: Path, here: DeviceContext
) -> None:
    for depth in (0, 2):
        run = text_run(tmp_path, kind, freeze_depth=depth)
        plain = prepare_training(
            replace(run, recipe=run.recipe.model_copy(update={"lora": None})), here, "accuracy"
        )
        context = prepare_training(run, here, "accuracy")
        assert torch.equal(outputs(plain), outputs(context))
        before = {k: v.clone() for k, v in context.staged_model.model.named_parameters()}
        list(fit(context, run.recipe, run.seed))
        changed = {
            name
            for name, value in context.staged_model.model.named_parameters()
            if not torch.equal(value, before[name])
        }
        trained = {
            name
            for name, value in context.staged_model.model.named_parameters()
            if value.requires_grad
        }
        head = "classifier" if kind == "bert" else "score"
        assert changed and changed <= trained
        assert any(f"{MARK}B" in name for name in changed) and any(head in name for name in changed)
        assert all(MARK in name or head in name or "pooler" in name for name in trained)
        assert not any(
            f".{depth - 2}." in name for name in trained
        )  # blocks of the prefix have none


def test_a_merged_model_computes_what_its_adapters_computed(
    tmp_path: Path, here: DeviceContext
) -> None:
    """GPT-2's matrices lie the other way round, and that of its attention's output is a square."""
    for kind in ("bert", "gpt2"):
        run = text_run(tmp_path, kind, lora__lr=300.0)
        context = prepare_training(run, here, "accuracy")
        start = outputs(context)
        list(fit(context, run.recipe, run.seed))
        with_adapters = outputs(context)
        names = set(dict(context.staged_model.model.named_parameters()))
        merge_adapters(context.staged_model.model)
        assert torch.allclose(outputs(context), with_adapters, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(start, with_adapters, atol=1e-3)
        merged = set(dict(context.staged_model.model.named_parameters()))
        assert merged == {name.replace(".base_layer", "") for name in names if MARK not in name}


def test_alpha_scales_what_the_adapters_add(tmp_path: Path, here: DeviceContext) -> None:
    """Hu et al., ICLR 2022: W + alpha / rank * B A."""
    added = []
    for alpha in (4.0, 12.0):
        context = prepare_training(text_run(tmp_path, lora__alpha=alpha), here, "accuracy")
        model = context.staged_model.model
        before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("layer.weight")}
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        merge_adapters(model)
        merged = dict(model.named_parameters())
        added.append([merged[n.replace(".base_layer", "")] - before[n] for n in before])
    assert added[0] and all(float(x.abs().max()) > 0 for x in added[0])
    for smaller, larger in zip(*added, strict=True):
        assert torch.allclose(larger, 3 * smaller, atol=1e-5)


def test_a_killed_training_goes_on_from_a_checkpoint_that_holds_only_what_trains(
    tmp_path: Path, here: DeviceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MIN_WRITE_SECONDS", 0.0)
    run = text_run(tmp_path, epochs=3, ema=0.9, unfreeze_every=1)
    whole = prepare_training(run, here, "accuracy")
    undisturbed = [progress.epoch for progress in fit(whole, run.recipe, run.seed)]
    killed = prepare_training(run, here, "accuracy")
    folder = tmp_path / "checkpoints"
    for progress in fit(killed, run.recipe, run.seed, open_checkpoints(run, killed, folder)):
        if progress.epoch.number == 2:
            break
    tensors = safetensors.torch.load_file(list_checkpoints(folder)[0])
    saved = {name.removeprefix("net.") for name in tensors if name.startswith("net.")}
    parameters = dict(killed.net.named_parameters())
    assert saved & parameters.keys() == trained_parameters(killed.net).keys()
    assert {MARK in name or name.startswith("head.") for name in saved & parameters.keys()} == {
        True
    }
    resumed = prepare_training(run, here, "accuracy")
    best = open_checkpoints(run, resumed, folder, keep_best_weights=True)
    continued = [progress.epoch for progress in fit(resumed, run.recipe, run.seed, best)]
    assert [(e.loss, e.scores) for e in continued] == [(e.loss, e.scores) for e in undisturbed]
    assert module_digest(resumed.net) == module_digest(whole.net)
    (file,) = folder.glob("best-*")
    again = prepare_training(run, here, "accuracy")
    assert checkpoint_content.load_best_weights(file, again.staged_model.model, again.net)
    assert torch.equal(outputs(again), outputs(whole))


def test_adapters_have_a_rate_of_their_own_and_rank_0_means_none(
    tmp_path: Path, here: DeviceContext
) -> None:
    run = text_run(tmp_path, lora__lr=7.0)
    context = prepare_training(run, here, "accuracy")
    rates = {
        group["lr"]: {
            MARK in name
            for name, p in context.net.named_parameters()
            if any(p is q for q in group["params"])
        }
        for group in make_optimizer(context.net, run.recipe).param_groups
    }
    assert rates == {run.recipe.lr: {False}, 7 * run.recipe.lr: {True}}
    none = prepare_training(text_run(tmp_path, lora__rank=0), here, "accuracy")
    assert all(p.requires_grad for p in none.net.parameters())
    assert not any(MARK in name for name, _ in none.net.named_parameters())


def test_frozen_weights_stay_in_bfloat16_and_what_trains_is_float32(
    tmp_path: Path, here: DeviceContext
) -> None:
    small_transformers.write_model_folder(tmp_path, "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(
        {name: value.bfloat16() for name, value in state.items()}, path, {"format": "pt"}
    )
    run = text_run(tmp_path, "gpt2", freeze_depth=1, epochs=1)
    context = prepare_training(run, here, "accuracy")
    kinds = {name: value.dtype for name, value in context.staged_model.model.named_parameters()}
    trained = trained_parameters(context.net)
    assert {kinds[n] for n in kinds if MARK not in n and "score" not in n} == {torch.bfloat16}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert context.device_context.precision == "bfloat16"
    (progress,) = fit(context, run.recipe, run.seed)
    assert progress.epoch.scores["accuracy"] >= 0
    without = prepare_training(text_run(tmp_path, "gpt2", lora__rank=0), here, "accuracy")
    assert {value.dtype for value in without.net.parameters()} == {torch.float32}


def test_a_soup_averages_merged_adapters_of_several_ranks(tmp_path: Path) -> None:
    runs = [
        text_run(tmp_path, epochs=1, lora__lr=100.0),
        text_run(tmp_path, epochs=1, lora__rank=2, lora__lr=100.0, freeze_depth=2),
    ]
    engine = EngineSettings(device="cpu")
    home = str(tmp_path / "home")
    ingredients = []
    for number, run in enumerate(runs):
        assignment = Assignment(
            run, "accuracy", engine, home, checkpoint_folder=str(tmp_path / str(number))
        )
        file = soup.retrain_ingredient(assignment, lambda _: True, 0)
        assert file is not None
        ingredients.append(Ingredient(number, run, file))
    context = soup.prepare_common_stages(assignment, ingredients, 0)
    start = copy_state(context)
    states = [soup.read_state(context, i, start, 16) for i in ingredients]
    for run, state in zip(runs, states, strict=True):
        trained = prepare_training(run, select_device(engine, Path(home)), "accuracy")
        list(fit(trained, run.recipe, run.seed))
        context.net.load_state_dict(state)
        assert torch.allclose(outputs(context), outputs(trained), rtol=1e-4, atol=1e-5)
    context.net.load_state_dict(start)
    soup.make_soup(context, ingredients, 16)
    name = next(name for name in states[0] if name.endswith("block1.0.layer.output.dense.weight"))
    made = copy_state(context)[name]
    assert torch.allclose(made, (states[0][name] + states[1][name]) / 2, atol=1e-6)
    assert not torch.allclose(states[0][name], states[1][name])


def digits_run(*words: str) -> Run:
    document = yaml_document.parse_document(DIGITS, "digits.yaml")
    return parsing.parse_space(parsing.apply_overrides(document, words)).sample(None, seed=1)


def test_timms_transformers_have_adapters_where_layers_are_called(here: DeviceContext) -> None:
    pytest.importorskip("timm")
    run = digits_run("recipe.freeze_depth=2", "data.limit=200")
    context = prepare_training(run, here, "accuracy")
    adapted = {name.partition(MARK)[0] for name in trained_parameters(context.net) if MARK in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"qkv", "proj", "fc1", "fc2"}
    chosen = prepare_training(
        digits_run("recipe.lora.targets=[attn.qkv]", "data.limit=200"), here, "accuracy"
    )
    names = {name.partition(MARK)[0] for name in trained_parameters(chosen.net) if MARK in name}
    assert {name.rpartition(".")[2] for name in names} == {"qkv"} and len(names) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.lora.targets=[qvk]"], "no layer 'qvk'.*did you mean 'qkv'"),
        (["model.name=resnet18_slim", "model.weights=none"], "has no linear layers"),
    ],
)
def test_what_has_no_adapters_says_so(words: list[str], message: str, here: DeviceContext) -> None:
    pytest.importorskip("timm")
    with pytest.raises(SpaceError, match=message):
        prepare_training(digits_run("data.limit=200", *words), here, "accuracy")


def test_layers_whose_weights_are_used_without_a_call_get_no_adapter(here: DeviceContext) -> None:
    """torch's own attention gives the weights of its output layer to a function."""
    words = ("model.name=tests.training.test_adapters:build_attention", "data.limit=100")
    text = DIGITS.replace(
        "timm/test_vit, weights: none", "'tests.training.test_adapters:build_attention'"
    )
    run = parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(text, "own.yaml"), words[1:])
    ).sample(None, seed=1)
    context = prepare_training(run, here, "accuracy")
    names = {name.partition(MARK)[0] for name in trained_parameters(context.net) if MARK in name}
    assert names == {"block.after"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(96, 2, batch_first=True)
        self.after = nn.Linear(96, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(1, 2).flatten(2)
        mixed: torch.Tensor = self.after(self.attention(rows, rows, rows)[0])
        return mixed.mean(1)


def build_attention(outputs: int) -> nn.Module:
    """A user's own model."""
    modules = {"block": Attention(), "head": nn.Linear(8, outputs)}
    sequential = nn.Sequential()
    for name, module in modules.items():
        sequential.add_module(name, module)
    return sequential


@pytest.mark.slow
def test_a_vision_transformer_with_adapters_from_search_to_prediction(
    tmp_path: Path, tuner: Any
) -> None:
    """vit_tiny with random weights on real digits: rank searched, merged at export, read back."""
    pytest.importorskip("timm")
    file = tmp_path / "digits.yaml"
    file.write_text(
        "task: classification\ndata: {name: digits, size: 32, limit: 100}\n"
        "model: {name: timm/vit_tiny_patch16_224, weights: none}\n"
        "recipe: {lr: 1.0e-3, epochs: 1, batch_size: 32, freeze_depth: [4, 9],\n"
        "  lora: {rank: {low: 4, high: 16, log: true}, alpha: [16.0, 32.0]}}\n"
        "search: {trials: 2, seed: 1}\nengine: {name: inline, device: cpu}\nexport: [safetensors]\n"
    )
    result: CommandResult = tuner("run", file, "--studies", tmp_path)
    assert result.code == 0, result.err
    export = tmp_path / "digits" / "export"
    state = safetensors.torch.load_file(export / "model.safetensors")
    assert "blocks.11.attn.qkv.weight" in state and not any("lora" in name for name in state)
    assert "rank:" in (tmp_path / "digits" / "best.yaml").read_text()
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    answer: CommandResult = tuner("predict", export, tmp_path / "black.png")
    assert answer.code == 0 and "black.png" in answer.out


@pytest.mark.slow
def test_a_large_model_is_held_once_in_its_own_precision(
    tmp_path: Path, here: DeviceContext
) -> None:
    """By the bytes of all tensors that a training holds: frozen weights are there in bfloat16 alone,
    in the training and in the model that the next trial copies (beside a GPU in the machine's
    memory); of what is trained there are a weight, a gradient, two averages of AdamW, the best
    epoch and the latest.
    """
    folder = small_transformers.write_model_folder(tmp_path, "gpt2", weights=False)
    config = small_transformers.small_config("gpt2", 48)
    config.n_embd, config.n_layer, config.n_head = 384, 6, 4
    model = small_transformers.auto_class("gpt2").from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    building._cached_models.clear()  # of an earlier test; its memory would be used again
    building._loaded_datasets.clear()
    known = storages()
    run = text_run(tmp_path, "gpt2", freeze_depth=2, epochs=2)
    context = prepare_training(run, here, "accuracy")
    list(fit(context, run.recipe, run.seed))
    held: Counter[torch.dtype] = Counter()
    for place, (dtype, size) in storages().items():
        held[dtype] += 0 if place in known else size
    parameters = list(context.staged_model.model.parameters())
    trained = {id(value) for value in trained_parameters(context.net).values()}
    frozen_bytes = sum(2 * p.numel() for p in parameters if id(p) not in trained)
    trained_bytes = sum(4 * p.numel() for p in parameters if id(p) in trained)
    assert frozen_bytes > 20e6 and trained_bytes < frozen_bytes / 20
    assert {p.dtype for p in parameters if id(p) not in trained} == {torch.bfloat16}
    assert frozen_bytes < held[torch.bfloat16] < 2 * frozen_bytes + EXAMPLE_BYTES
    assert trained_bytes < held[torch.float32] < 6 * trained_bytes + EXAMPLE_BYTES


EXAMPLE_BYTES = 2e6  # of the activations of 60 short texts


def storages() -> dict[int, tuple[torch.dtype, int]]:
    """The memory of every tensor that is alive: type and bytes by address."""
    gc.collect()
    # not those of an earlier export, which have no memory
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter)]
    return {
        t.untyped_storage().data_ptr(): (t.dtype, t.untyped_storage().nbytes()) for t in tensors
    }
