"""A tag for each word of a text, such as the names in it: tokens are classified, entities scored.

The tags are O, B-X and I-X for each type X of entities (BIO). The first token of each word is
classified by the vector that the model has for it, and the loss is cross-entropy over these tokens,
as Devlin et al. do it (BERT, NAACL 2019, section 5.3).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree, TextInputSpec, relative_difference
from tuner.core.losses import mean_cross_entropy
from tuner.core.targets import IGNORED_TAG
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.preprocessing.tokenization import decode_texts, locate_tokens, trim_padding
from tuner.preprocessing.word_alignment import WordRule, align_words, find_words
from tuner.tasks._classification import class_weights_of
from tuner.tasks._csv_tables import encode_csv
from tuner.tasks._entities import (
    TagSet,
    count_entities,
    find_entities,
    precision_recall_f1,
)

METRICS = ("entity_f1", "entity_precision", "entity_recall", "token_accuracy")
RECIPE_KEYS = ("class_weights",)
OUTPUTS = "tags"
RECIPES_OF = "text_classification"
MAX_WORST = 50  # texts listed
MAX_SHOWN = 6  # entities that a line names


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    class_counts: Tensor | None = None,
    *,
    words: Annotated[
        Literal["punctuation", "spaces"],
        Field(
            description="where predict divides a text into words: at spaces and around each "
            "punctuation mark, or at spaces alone, for texts whose words are already apart"
        ),
    ] = "punctuation",
) -> Task:
    """The task for these tags.

    Args:
        classes: the names of the tags: O, B-X and I-X.
        recipe: how the model is trained; the loss follows it.
        class_counts: int64 (tags,), how many training words each tag has, on the device of the
            training; None: tags are not weighted.
        words: where predict divides a text into words.
    """
    weights = class_weights_of(recipe, class_counts)
    return TokenClassification(classes, recipe.label_smoothing, weights, words)


class TokenClassification(Task):
    """Gives each word of a text a tag.

    y is int16 (n, length), IGNORED_TAG for tokens that are not the first of a word. A model gives
    logits (n, length, tags). Predictions are tags, int64 (n, length of the longest text).
    """

    metrics = METRICS
    scores_on_cpu = True

    output_description = (
        "logits (batch, token, tag) in the order of the classes, which are the tags; that of a "
        "word is the argmax at its first token"
    )

    def __init__(
        self,
        classes: tuple[str, ...],
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        words: WordRule = "punctuation",
    ) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing
        self.class_weights, self.words = class_weights, words
        self.tag_set = TagSet.of(classes)

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Mean over the first tokens of words.

        x may also be features of single tokens, (k, features), with y of (k,): those on which a
        linear probe is solved.
        """
        assert isinstance(batch.y, Tensor)
        logits = net(trim_padding(batch.x)).float()
        tags = batch.y.long()
        if logits.dim() == 3:
            tags = tags[:, : logits.shape[1]].flatten()
        return mean_cross_entropy(
            logits.flatten(0, -2), tags, IGNORED_TAG, self.label_smoothing, self.class_weights
        )

    def predict(self, net: nn.Module, x: TensorTree) -> Tensor:
        tags: Tensor = net(trim_padding(x)).argmax(-1)
        return tags

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """F1, precision and recall of entities over all types (micro), and the share of words with
        the right tag.

        An entity is right where its first word, its last word and its type are.
        """
        results = self.example_results(pairs)
        return self.score_results(results, torch.ones(len(results["words"]), dtype=torch.int64))

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """Entities of each type in each text that are `hits`, `true` and `predicted`, int64 (n,
        types) each; its `words`, and `right_words`, those with the right tag, int64 (n,).
        """
        parts = [self._count(predicted, truth) for predicted, truth in pairs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _count(self, predicted: Tensor, truth: Tensor) -> ExampleResults:
        tags, true_tags, counted = _aligned(predicted, truth)
        right = (tags == true_tags) & counted
        return {
            **count_entities(tags, true_tags, counted, self.tag_set),
            "words": torch.from_numpy(counted.sum(1)),
            "right_words": torch.from_numpy(right.sum(1)),
        }

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        sums = {
            name: int((values.reshape(len(counts), -1).sum(1) * counts).sum())
            for name, values in results.items()
        }
        precision, recall, f1 = precision_recall_f1(sums["hits"], sums["true"], sums["predicted"])
        return {
            "entity_f1": f1,
            "entity_precision": precision,
            "entity_recall": recall,
            "token_accuracy": sums["right_words"] / max(1, sums["words"]),
        }

    def class_scores(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number of true entities of each type."""
        results = self.example_results(pairs)
        scores = {}
        for number, name in enumerate(self.tag_set.types):
            hits, true, predicted = (
                int(results[kind][:, number].sum()) for kind in ("hits", "true", "predicted")
            )
            values = precision_recall_f1(hits, true, predicted)
            scores[name] = dict(zip(("precision", "recall", "f1"), values, strict=True))
            scores[name]["examples"] = true
        return scores

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """The scores of each type, and the texts with the most entities missed or made up, as the
        model saw them.
        """
        per_type = self.class_scores(pairs)
        rows = [
            [
                name,
                *(f"{values[key]:.4f}" for key in ("precision", "recall", "f1")),
                values["examples"],
            ]
            for name, values in per_type.items()
        ]
        results = self.example_results(pairs)
        missed, made_up = (
            (results[name] - results["hits"]).sum(1) for name in ("true", "predicted")
        )
        wrong = missed + made_up
        worst = wrong.argsort(descending=True, stable=True)[:MAX_WORST]
        worst = worst[wrong[worst] > 0]
        texts = decode_texts(data.input_spec, data.valid.take(worst, 0).x) if len(worst) else []
        mistakes = [
            [int(missed[i]), int(made_up[i]), text]
            for i, text in zip(worst.tolist(), texts, strict=True)
        ]
        return {
            "per_class.csv": encode_csv(["type", "precision", "recall", "f1", "entities"], rows),
            "mistakes.csv": encode_csv(["missed", "made_up", "text"], mistakes),
        }

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """The entities of each text, with their characters in it.

        `probability` is the lowest of the tags of an entity's words: an entity is as sure as its
        least sure word.
        """
        assert isinstance(input_spec, TextInputSpec)
        logits = function(trim_padding(x))
        assert isinstance(logits, Tensor)
        probabilities = logits.float().softmax(-1).cpu().numpy()
        starts = locate_tokens(input_spec, originals).numpy()
        return [
            self._describe_text(text, row, row_starts)
            for text, row, row_starts in zip(originals, probabilities, starts, strict=True)
        ]

    def _describe_text(
        self, text: str, probabilities: NDArray[np.float32], starts: NDArray[np.int32]
    ) -> Prediction:
        words = find_words(text, self.words)
        numbers, positions = align_words(words, starts)
        of_words = probabilities[positions]
        best = of_words.max(1) if len(of_words) else np.zeros(0, np.float32)
        tags = of_words.argmax(1)[None] if len(of_words) else np.zeros((1, 0), np.int64)
        found = find_entities(tags, np.ones(tags.shape, np.bool_), self.tag_set)
        entities = []
        for first, last, kind in zip(found.firsts, found.lasts, found.types, strict=True):
            begin, end = words[numbers[first]][0], words[numbers[last]][1]
            entities.append(
                {
                    "label": self.tag_set.types[kind],
                    "start": begin,
                    "end": end,
                    "text": text[begin:end],
                    "probability": float(best[first : last + 1].min()),
                }
            )
        return Prediction(describe_entities(entities), {"entities": entities})


def describe_entities(entities: Sequence[dict[str, Any]]) -> str:
    """Entities as a line for a person."""
    named = [f"{e['label']} {e['text']!r} {e['probability']:.3f}" for e in entities[:MAX_SHOWN]]
    more = len(entities) - len(named)
    return "  ".join([*named, *([f"and {more} more"] if more else [])]) or "no entities"


def _aligned(
    predicted: Tensor, truth: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Predicted and true tags, int64 (n, length), and where a word is counted, bool (n, length).

    Predictions end with the longest text of a batch, where targets may be padded further.
    """
    true_tags = truth.cpu().long()
    missing = true_tags.shape[1] - predicted.shape[1]
    tags = F.pad(predicted.cpu(), (0, max(0, missing)))[:, : true_tags.shape[1]].numpy()
    counted = (true_tags != IGNORED_TAG).numpy()
    return tags, true_tags.clamp_min(0).numpy(), counted
