"""transformers' models of texts (extra `text`).

They are cut at the embeddings, every block and the head. BERT, DistilBERT, RoBERTa and GPT-2 have
names of their own; others have the name `hf/<name>`.

Wolf et al., Transformers: State-of-the-Art Natural Language Processing, EMNLP 2020. Devlin et al.,
BERT, NAACL 2019; Sanh et al., DistilBERT, 2019; Liu et al., RoBERTa, 2019; Radford et al., Language
Models are Unsupervised Multitask Learners (GPT-2), 2019.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from tuner.core.input_spec import TextInputSpec
from tuner.core.types import StagedModel
from tuner.errors import DataError, SpaceError, limit_listing
from tuner.models import _hub
from tuner.models._transformer_stages import stage_transformer
from tuner.preprocessing.tokenization import load_tokenizer, silence_transformers

TASKS = (
    "text_classification",
    "text_multilabel",
    "text_regression",
    "text_generation",
    "token_classification",
)
NAMES = ("bert", "distilbert", "roberta", "gpt2", "hf/*")
EXPORTS = (
    "safetensors",
    "torch_export",
    "onnx",
    "onnx_fp16",
    "onnx_int8",
    "openvino",
    "pretrained",
)
RECIPES = {
    # Devlin et al., section A.3: batch 16 or 32, lr 5e-5, 3e-5 or 2e-5, 2 to 4 epochs, decay 0.01,
    # warmup, linear; the highest of these rates, which is the default of the library's Trainer
    # too: hundreds of texts are few steps (benchmarks/README.md, "Texts"). Mosbach et al., On the
    # Stability of Fine-tuning BERT, ICLR 2021: batch 16, warmup over a tenth of the steps,
    # gradients clipped at 1
    "text_classification": {
        "optimizer": "adamw",
        "lr": 5e-5,
        "weight_decay": 0.01,
        "epochs": 3,
        "batch_size": 16,
        "schedule": "linear",
        "warmup": 0.1,
        "clip_norm": 1.0,
    },
    # the defaults of the library's examples/pytorch/language-modeling/run_clm.py, which are those
    # of its TrainingArguments
    "text_generation": {
        "optimizer": "adamw",
        "lr": 5e-5,
        "epochs": 3,
        "batch_size": 8,
        "schedule": "linear",
        "clip_norm": 1.0,
    },
}
# positions that no token gets: in these models the positions begin after that of the padding
RESERVED_POSITIONS = {"roberta": 2, "camembert": 2, "xlm-roberta": 2, "mpnet": 2}
# rates of dropout in the configurations: BERT's and RoBERTa's, ALBERT's, DeBERTa's, ModernBERT's,
# DistilBERT's, GPT-2's and Phi's, GPT-NeoX's
DROPOUT_NAMES = (
    "hidden_dropout_prob",
    "classifier_dropout",
    "classifier_dropout_prob",
    "cls_dropout",
    "pooler_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "hidden_dropout",
    "dropout",
    "seq_classif_dropout",
    "embd_pdrop",
    "resid_pdrop",
)
AUTO_CLASSES = {
    "text_generation": "AutoModelForCausalLM",
    "token_classification": "AutoModelForTokenClassification",
}
"""The library's class by task; of other tasks the one for whole texts."""
ENCODER_TYPES = (
    "bert",
    "distilbert",
    "roberta",
    "camembert",
    "xlm-roberta",
    "albert",
    "deberta",
    "deberta-v2",
    "electra",
    "modernbert",
    "mpnet",
)
TYPED_TOKENS = ("bert", "albert", "deberta-v2", "electra")  # they tell a first text from a second


def input_spec(
    name: str,
    home: Path | None = None,
    *,
    folder: str | None = None,
    length: int = 128,
) -> TextInputSpec:
    """The model's tokenizer, and which of its outputs the model takes.

    Args:
        name: The model's name in the space file.
        home: The folder of caches and downloads. Without it nothing is downloaded, and the result
            is what follows from the name alone.
        folder: The user's own folder, or None for the model of the hub.
        length: Tokens that the model sees of a text.

    Raises:
        SpaceError: The model does not have as many positions as `length`.
        DataError: A file is missing from the folder or the hub.
    """
    library = _hub.import_transformers()
    if folder is not None:
        root: Path | None = _hub.check_own_folder(folder, name)
        load_tokenizer(str(root))  # first of all, so that an error in it is reported first
    else:
        root = None
        if home is not None:
            root = _hub.fetch_hub_folder(home, _hub_repository(name), weights=False)
    config = _model_config(library, name, root)
    positions = getattr(config, "max_position_embeddings", None)
    max_length = positions and positions - RESERVED_POSITIONS.get(config.model_type, 0)
    if max_length is not None and length > max_length:
        raise SpaceError(
            f"model.length: {length}, but the model has places for {max_length} tokens"
        )
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    if config.model_type in TYPED_TOKENS and config.type_vocab_size > 1:
        input_names += ("token_type_ids",)
    return TextInputSpec(str(root or ""), length, input_names)


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    own_precision: bool = False,
    *,
    folder: Annotated[
        str | None,
        Field(
            description="a local folder as save_pretrained writes it; null: the model of the hub"
        ),
    ] = None,
    weights: Annotated[
        Literal["default", "none"],
        Field(description="default: those of the folder or the hub; none: fresh parameters"),
    ] = "default",
    length: Annotated[
        int,
        Field(
            ge=2,
            le=1_000_000,
            description="tokens that the model sees of a text; longer texts are truncated",
        ),
    ] = 128,
    dropout: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="share of the hidden values that training sets to 0, in the blocks and "
            "before the head; null: as the model's configuration says",
        ),
    ] = None,
) -> StagedModel:
    """The model with a head of `outputs` classes for each text, or for each token of it; or one
    that predicts the next token.

    Depth 1 freezes the embeddings, each depth after it one block more. With `own_precision` weights
    that are stored in bfloat16 stay in it, but for those of the head; otherwise all are float32.

    Raises:
        SpaceError: The model is not for the task.
        DataError: The weights are missing, damaged or of another model.
    """
    library = _hub.import_transformers()
    generating = task == "text_generation"
    root = _hub.export_tokenizer_folder(home) if weights == "none" else None
    if root is None and folder is not None:
        root = _hub.check_own_folder(folder, name)
    elif root is None and (weights == "default" or name.startswith("hf/")):
        root = _hub.fetch_hub_folder(
            home,
            _hub_repository(name),
            weights=weights == "default",
            tokenizer=weights == "default",
        )
    elif root is None:
        hub_folder = _hub.hub_folder(home, _hub_repository(name))
        if (hub_folder / _hub.CONFIG_FILE).exists():
            root = hub_folder  # its configuration states the size of the tokenizer's vocabulary
    config = _model_config(library, name, root)
    if generating and config.model_type in ENCODER_TYPES:
        raise SpaceError(
            f"model.name: {name} reads texts in both directions and cannot continue them; "
            "text_generation wants gpt2 or hf/…"
        )
    if not generating:
        config.num_labels = outputs
    _set_dropout(config, dropout)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = getattr(config, "eos_token_id", None)
    auto = getattr(library, AUTO_CLASSES.get(task, "AutoModelForSequenceClassification"))
    notes: tuple[str, ...] = ()
    try:
        with silence_transformers():
            if weights == "none":
                model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
            else:
                assert root is not None
                dtype = _stored_type(root) if own_precision else torch.float32
                model, notes = _load_pretrained(auto, root, config, dtype)
    except ValueError as error:
        raise SpaceError(
            f"model.name: {name}: transformers {library.__version__}: {_short_message(error)}"
        ) from None
    model.config.use_cache = False  # the cache of keys and values only wastes memory in training
    staged_model = stage_transformer(model, task, notes)
    list(staged_model.stages.values())[-1].float()
    return staged_model


def _set_dropout(config: Any, dropout: float | None) -> None:
    """Sets the rates under the names that the configurations of the library have for them, where
    the user states one; those of attention weights stay.
    """
    for name in DROPOUT_NAMES if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)


def _short_message(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


def _hub_repository(name: str) -> str:
    """The model's repository on the hub.

    Raises:
        SpaceError: The name is hf/… without an owner.
    """
    repository = _hub.HUB_REPOSITORIES.get(name) or name.partition("/")[2]
    if repository.count("/") != 1 or not all(
        part and part.strip(".") for part in repository.split("/")
    ):
        raise SpaceError(
            f"model.name: {name!r} is no model of the hub's; write hf/<owner>/<model>, or give "
            "model.folder"
        )
    return repository


def _model_config(library: Any, name: str, root: Path | None) -> Any:
    """The configuration in a folder, or the library's own where there is no folder.

    Raises:
        SpaceError: The library does not know this type of model.
    """
    if root is None:
        return library.AutoConfig.for_model(name if name in _hub.HUB_REPOSITORIES else "bert")
    kind = _hub.read_config(root)["model_type"]
    try:
        with silence_transformers():
            return library.AutoConfig.from_pretrained(
                root, local_files_only=True, trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SpaceError(
            f"model.name: {name}: transformers {library.__version__} builds no {kind} from "
            f"{root}: {_short_message(error)}"
        ) from None


def _stored_type(root: Path) -> torch.dtype:
    """The precision in which a folder's weights are computed: bfloat16 where they are stored so."""
    import safetensors

    path = root / _hub.WEIGHTS_FILE
    if not path.is_file():
        path = min(root.glob("*.safetensors"), default=path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return torch.float32  # what is wrong with the file is said where it is loaded
    return torch.bfloat16 if kinds and kinds.count("BF16") * 2 > len(kinds) else torch.float32


def _load_pretrained(
    auto: Any, root: Path, config: Any, dtype: torch.dtype
) -> tuple[Any, tuple[str, ...]]:
    """The model with the folder's weights, and notes on what is new in it.

    Raises:
        DataError: The weights are missing, damaged or of another model.
    """
    from safetensors import SafetensorError

    if not (root / _hub.WEIGHTS_FILE).is_file() and not (root / _hub.SHARD_INDEX_FILE).is_file():
        pickles = sorted(p.name for p in root.glob("*.bin"))
        also = f" ({', '.join(pickles)} may run code when loaded: convert it)" if pickles else ""
        raise DataError(
            f"model.folder: {root} has no {_hub.WEIGHTS_FILE}{also}; write model.weights: none to "
            "begin with fresh parameters"
        )
    try:
        model, loading_info = auto.from_pretrained(
            root,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(
            f"model.folder: {root / _hub.WEIGHTS_FILE} is damaged or of another model "
            f"({_short_message(error)})"
        ) from None
    mismatched_keys = (key for key, *_ in loading_info["mismatched_keys"])
    new_keys = sorted({*loading_info["missing_keys"], *mismatched_keys})
    body_keys = [
        key
        for key in new_keys
        if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key
    ]
    if body_keys:
        listed = ", ".join(limit_listing(body_keys, 5))
        raise DataError(
            f"model.folder: {root / _hub.WEIGHTS_FILE} has no {listed} as {config.model_type} "
            "wants; these are another model's weights"
        )
    non_finite = [
        name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())
    ]
    if non_finite:
        raise DataError(
            f"model.folder: {root / _hub.WEIGHTS_FILE}: {non_finite[0]} holds "
            "NaN or infinite values"
        )
    new_modules = sorted({key.rpartition(".")[0] for key in new_keys})
    return model, tuple(f"{name}: new, the weights have none that fit" for name in new_modules)
