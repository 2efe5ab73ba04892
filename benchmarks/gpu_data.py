"""The data that the GPU kit makes itself: photographs, boxes, masks and texts, each learnable, and a BERT without weights."""

import csv
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 85  # of the JPEGs
COLOURS = ((200, 60, 50), (60, 170, 70), (60, 80, 200), (200, 170, 60))  # of class 0, 1, …
CLASSES = len(COLOURS)
SPLITS = ("train", "valid", "test")
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def texture(number: int, size: tuple[int, int]) -> Pixels:
    """uint8 (height, width, 3): soft shapes under noise, so that a JPEG is about as large as a photograph's."""
    rng = np.random.default_rng(number)
    width, height = size
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-14, 15, (height, width, 1), np.int16)
    return np.clip(smooth // 2 + 64 + noise, 0, 255).astype(np.uint8)


def write_photographs(folder: Path, counts: tuple[int, int, int], size: tuple[int, int]) -> Path:
    """`folder`/{train,valid,test}/<class>/*.jpg, `counts` of each split; a patch in each tells its class."""
    if folder.exists():
        return folder

    def write(job: tuple[str, int]) -> None:
        split, number = job
        label = number % CLASSES
        pixels = texture(number, size)
        top, left = size[1] // 4, size[0] // 4
        pixels[top : 3 * top, left : 3 * left] = (
            pixels[top : 3 * top, left : 3 * left] // 3 + np.array(COLOURS[label], np.uint8) // 2
        )
        Image.fromarray(pixels).save(
            folder / split / f"class{label}" / f"{number:06d}.jpg", quality=QUALITY
        )

    jobs, number = [], 0
    for split, count in zip(SPLITS, counts, strict=True):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
        jobs += [(split, number + i) for i in range(count)]
        number += count
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, jobs))
    return folder


def _rectangle(rng: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom; a quarter to a half of the side."""
    width, height = (int(v) for v in rng.integers(side // 4, side // 2, 2))
    left, top = int(rng.integers(0, side - width)), int(rng.integers(0, side - height))
    return left, top, left + width, top + height


def write_boxes(folder: Path, count: int, side: int) -> Path:
    """Pascal VOC's images/ and annotations/: one to three coloured rectangles on each, their class is their colour."""
    if folder.exists():
        return folder
    for inner in ("images", "annotations"):
        (folder / inner).mkdir(parents=True)

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        pixels, objects = texture(number, (side, side)), ""
        for _ in range(int(rng.integers(1, 4))):
            left, top, right, bottom = _rectangle(rng, side)
            label = int(rng.integers(0, 2))
            pixels[top:bottom, left:right] = COLOURS[label]
            box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
            objects += f"<object><name>class{label}</name><bndbox>{box}</bndbox></object>"
        Image.fromarray(pixels).save(folder / "images" / f"{number:05d}.jpg", quality=QUALITY)
        shape = f"<size><width>{side}</width><height>{side}</height><depth>3</depth></size>"
        text = f"<annotation>{shape}{objects}</annotation>"
        (folder / "annotations" / f"{number:05d}.xml").write_text(text)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return folder


def write_masks(folder: Path, count: int, side: int) -> Path:
    """images/ and masks/: a rectangle of each of two classes on a background."""
    if folder.exists():
        return folder
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True)

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        pixels, mask = texture(number, (side, side)), np.zeros((side, side), np.uint8)
        for label in (1, 2):
            left, top, right, bottom = _rectangle(rng, side)
            pixels[top:bottom, left:right] = COLOURS[label]
            mask[top:bottom, left:right] = label
        Image.fromarray(pixels).save(folder / "images" / f"{number:05d}.jpg", quality=QUALITY)
        Image.fromarray(mask).save(folder / "masks" / f"{number:05d}.png")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return folder


def write_texts(file: Path, count: int, words: int, longest: int) -> Path:
    """A csv of texts of 10 to `longest` words out of `words`; those of a class have words of their own."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        label = number % 2
        text = [f"w{draw.randrange(words)}" for _ in range(draw.randint(10, longest))]
        rows.append((" ".join([*text, f"w{label}", str(number)]), f"class{label}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    return file


def write_bert(folder: Path, words: int, **config: int) -> Path:
    """A BERT as save_pretrained writes it, without weights: its configuration, and a tokenizer of whole words.

    `config` are keys that differ from BERT-base's.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = [
        *special,
        *(f"w{i}" for i in range(words)),
        *"0123456789",
        *(f"##{i}" for i in range(10)),
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertConfig(vocab_size=max(30522 if not config else 0, len(pieces)), **config).save_pretrained(
        folder
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
