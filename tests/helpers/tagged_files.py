"""Files of sentences whose words have tags: names of people and places among common words.

A common word can be part of a name (Ann Day, but a warm day), and names break into several tokens.
"""

import json
import random
from pathlib import Path

FIRST, LAST = ["ann", "bill", "todd", "lena"], ["day", "warm", "grey", "lowell"]
PLACES = ["lodz", "st moritz", "new haven", "sidon"]
PATTERNS = [
    "we met {PER} in {LOC} , a warm day",
    "{PER} left {LOC} at once",
    "the film that {PER} liked was made in {LOC} .",
    "a cold day in {LOC}",
    "what a grey and warm day , said {PER}",
    "bad hours for us here today",
]
Sentence = list[tuple[str, str]]


def make_sentences(count: int, seed: int = 0) -> list[Sentence]:
    """The words of each sentence with their tags."""
    draw = random.Random(seed)
    return [make_sentence(PATTERNS[i % len(PATTERNS)], draw) for i in range(count)]


def make_sentence(pattern: str, draw: random.Random) -> Sentence:
    words = []
    for part in pattern.split():
        if not part.startswith("{"):
            words.append((part, "O"))
            continue
        kind = part[1:-1]
        name = f"{draw.choice(FIRST)} {draw.choice(LAST)}" if kind == "PER" else draw.choice(PLACES)
        words += [(w, f"{'I' if i else 'B'}-{kind}") for i, w in enumerate(name.split())]
    return words


def write_conll(path: Path, count: int = 60, seed: int = 0, between: str = "\t") -> Path:
    sentences = make_sentences(count, seed)
    text = "\n\n".join(
        "\n".join(f"{word}{between}{tag}" for word, tag in sentence) for sentence in sentences
    )
    path.write_text(f"{text}\n")
    return path


def write_spans(path: Path, count: int = 60, seed: int = 0) -> Path:
    """JSON lines with the same sentences as `write_conll`, as texts and spans."""
    rows = []
    for sentence in make_sentences(count, seed):
        text, spans = "", []
        for word, tag in sentence:
            begin = len(text) + bool(text)
            text = f"{text} {word}" if text else word
            if tag.startswith("B-"):
                spans.append({"start": begin, "end": len(text), "label": tag[2:]})
            elif tag.startswith("I-"):
                spans[-1]["end"] = len(text)
        rows.append(json.dumps({"text": text, "spans": spans}))
    path.write_text("\n".join(rows) + "\n")
    return path
