"""Texts as one fine-tunes a BERT with transformers: AdamW, linear decay, the grid of the BERT paper searched by Optuna.

    python benchmarks/plain_texts.py FOLDER --weights MINILM --predictions OUT.json --size 64 --epochs 4 [--trials 8]

The first trial is what transformers' Trainer does at its defaults: AdamW at 5e-5, no warm-up, no weight decay, 3 epochs (here
with batches of 16). The others choose lr, batch size and epochs from the grid of appendix A.3 of the BERT paper (Devlin et
al., NAACL 2019). Weights of the best epoch by macro-F1 on the validation texts.
"""

import argparse
import json
import warnings
from collections.abc import Iterator

import plain_search
import task_sets
import torch
from optuna import Trial
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.optimization import get_linear_schedule_with_warmup

DEFAULT = {"lr": 5e-5, "batch_size": 16, "epochs": 3}
EVAL_BATCH = 64


class Texts:
    """The texts of FOLDER, tokenised by batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(args.weights)
        self.folder, self.length = args.folder, args.size
        self.classes = sorted(set(task_sets.read_texts(args.folder, "train")[1]))

    def loader(self, part: str, batch_size: int, shuffle: bool) -> DataLoader:
        texts, labels = task_sets.read_texts(self.folder, part)
        rows = list(zip(texts, map(self.classes.index, labels), strict=True))
        return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=self.collate)

    def collate(self, rows: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*rows, strict=True)
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self.length, padding=True, return_tensors="pt"
        )
        return dict(tokens), torch.tensor(labels)


def train(args: argparse.Namespace, data: Texts, params: dict) -> Iterator[tuple[float, nn.Module]]:
    """One training; yields macro-F1 on the validation texts after each epoch."""
    model = AutoModelForSequenceClassification.from_pretrained(
        args.weights, num_labels=len(data.classes)
    )
    loader = data.loader("train", params["batch_size"], shuffle=True)
    valid = data.loader("valid", EVAL_BATCH, shuffle=False)
    epochs = min(params["epochs"], args.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params["lr"], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, epochs * len(loader))
    for _ in range(epochs):
        model.train()
        for tokens, labels in loader:
            loss = model(**tokens, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        probabilities, truth = predict(model, valid)
        yield (
            float(multiclass_f1_score(probabilities, truth, len(data.classes), average="macro")),
            model,
        )


@torch.inference_mode()
def predict(model: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and true classes (n,)."""
    model.eval()
    pairs = [(model(**tokens).logits.softmax(1), labels) for tokens, labels in loader]
    probabilities, truth = zip(*pairs, strict=True)
    return torch.cat(probabilities), torch.cat(truth)


def suggest(trial: Trial) -> dict:
    """The grid of the paper; `epochs` may be cut by --epochs."""
    return {
        "lr": trial.suggest_categorical("lr", [2e-5, 3e-5, 5e-5]),
        "batch_size": trial.suggest_categorical("batch_size", [16, 32]),
        "epochs": trial.suggest_categorical("epochs", [2, 3, 4]),
    }


def main() -> None:
    args = plain_search.arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    data = Texts(args)
    model = plain_search.search(args, DEFAULT, suggest, lambda params: train(args, data, params))
    probabilities, truth = predict(model, data.loader("test", EVAL_BATCH, shuffle=False))
    rows = [[int(y), p.tolist()] for y, p in zip(truth, probabilities, strict=True)]
    args.predictions.write_text(json.dumps({"classes": data.classes, "rows": rows}))


if __name__ == "__main__":
    main()
