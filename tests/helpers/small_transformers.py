"""Small transformers in folders of their own, with tokenizers trained here, and files of texts that can be told apart."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch

GOOD = [
    "a fine and warm film",
    "what a lovely warm day",
    "good plain fun",
    "we liked it a lot",
    "lovely fine fun for all of us here today",
]
BAD = [
    "a dull grey film",
    "what a cold bad day",
    "bad and sad",
    "we left it at once",
    "sad cold grey hours that would not end for us",
]
KINDS = ("bert", "distilbert", "roberta", "gpt2")


def make_corpus(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label), all texts different, of several lengths."""
    draw = random.Random(seed)
    words = " ".join(GOOD + BAD).split()
    return [
        (
            f"{draw.choice(GOOD if i % 2 else BAD)} {' '.join(draw.choices(words, k=draw.randint(0, 9)))} {i}",
            "good" if i % 2 else "bad",
        )
        for i in range(count)
    ]


def write_csv(path: Path, count: int = 60, seed: int = 0) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *make_corpus(count, seed)])
    return path


def write_model_folder(root: Path, kind: str, *, weights: bool = True, length: int = 48) -> Path:
    """A model of `kind` two blocks deep, as save_pretrained writes it, with its tokenizer."""
    from tuner.preprocessing.tokenization import silence_transformers

    place = root / kind
    place.mkdir(parents=True)
    write_tokenizer(place, kind)
    config = small_config(kind, length)
    with silence_transformers():
        if weights:
            torch.manual_seed(7)
            auto_class(kind).from_config(config).save_pretrained(place)
        else:
            config.save_pretrained(place)
    return place


def auto_class(kind: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM if kind == "gpt2" else transformers.AutoModel


def small_config(kind: str, length: int = 48, words: int = 200) -> Any:
    import transformers

    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=words,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=length,
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=words,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=length,
            bos_token_id=3,
            eos_token_id=3,
            pad_token_id=None,
        )
    config = transformers.BertConfig if kind == "bert" else transformers.RobertaConfig
    more = (
        {}
        if kind == "bert"
        else {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": length + 2}
    )
    known = {
        "vocab_size": words,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return config(**{"max_position_embeddings": length, **known, **more})


def write_tokenizer(place: Path, kind: str) -> None:
    """Trained on the corpus: word pieces for BERT's kin, byte pairs for the others."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    lines = [text for text, _ in make_corpus(200)]
    special = [
        "[PAD]",
        "<pad>",
        "[UNK]",
        "<|endoftext|>",
        "[CLS]",
        "[SEP]",
        "<s>",
        "</s>",
        "[MASK]",
    ]
    if kind in ("bert", "distilbert"):
        found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        found.normalizer = normalizers.BertNormalizer(lowercase=True)
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        found.decoder = decoders.WordPiece()
        found.train_from_iterator(
            lines,
            trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
        )
        begin, end = "[CLS]", "[SEP]"
    else:
        found = Tokenizer(models.BPE(unk_token="[UNK]"))
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        found.train_from_iterator(
            lines, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        )
        begin, end = "<s>", "</s>"
    if kind != "gpt2":
        found.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            pair=f"{begin} $A {end} $B:1 {end}:1",
            special_tokens=[(word, special.index(word)) for word in (begin, end)],
        )
    found.save(str(place / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    more = {
        "bert": {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"},
        "distilbert": {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"},
        "roberta": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        "gpt2": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    }
    (place / "tokenizer_config.json").write_text(json.dumps({**stated, **more[kind]}))
