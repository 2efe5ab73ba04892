"""Text generation: predicts the next token of a text.

The loss is cross-entropy, the scores are the perplexity and its negative logarithm, and a
prediction is a continuation of the text.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tuner.config.run import Recipe
from tuner.core.example_results import ExampleResults
from tuner.core.input_spec import InputSpec, TensorTree, TextInputSpec, relative_difference
from tuner.core.losses import mean_cross_entropy
from tuner.core.types import Batch, Dataset, Prediction, Task
from tuner.preprocessing.tokenization import (
    cut_padding,
    decode_texts,
    load_tokenizer,
    trim_padding,
)
from tuner.tasks._csv_tables import encode_csv

METRICS = ("negative_log_perplexity", "perplexity")
MINIMISED = ("perplexity",)
IGNORED_TOKEN = -100  # torch's and transformers' target for what is not to be predicted
MAX_WORST = 50  # texts listed
ROWS_PER_CHUNK = 8  # texts per forward pass when scoring; their logits (8, length, vocabulary) fit


def build(
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    max_new_tokens: Annotated[
        int, Field(ge=1, le=10_000, description="how many tokens predict adds to a text at most")
    ] = 40,
    top_k: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="each token is drawn from the likeliest so many; 1: always the likeliest",
        ),
    ] = 1,
    temperature: Annotated[
        float,
        Field(
            gt=0,
            le=100,
            description="below 1: likelier tokens are drawn more often; above 1: less often",
        ),
    ] = 1.0,
    seed: Annotated[
        int, Field(ge=0, le=2**32 - 1, description="of the tokens that predict draws")
    ] = 0,
) -> Task:
    """The task; a text model has no classes.

    Args:
        classes: empty.
        recipe: how the model is trained; its label smoothing is part of the loss.
        max_new_tokens: how many tokens a continuation has at most.
        top_k: the next token is drawn from so many likeliest tokens; 1 takes the likeliest.
        temperature: below 1 likelier tokens are drawn more often, above 1 less often.
        seed: of the tokens that are drawn.
    """
    return TextGeneration(recipe.label_smoothing, max_new_tokens, top_k, temperature, seed)


class TextGeneration(Task):
    """Continues texts.

    Nets give logits (n, length, vocabulary) for a tensor tree with `input_ids` and
    `attention_mask`; y is not used. Predictions are each text's `log_likelihood`, float32 (n,),
    summed over its `tokens`, int64 (n,), all tokens but the first.
    """

    metrics = METRICS

    output_description = "logits of the next token at each token, (batch, length, vocabulary)"

    def __init__(
        self, label_smoothing: float, max_new_tokens: int, top_k: int, temperature: float, seed: int
    ) -> None:
        self.label_smoothing, self.max_new_tokens = label_smoothing, max_new_tokens
        self.top_k, self.temperature, self.seed = top_k, temperature, seed

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Mean over the tokens that follow another."""
        x = trim_padding(batch.x)
        logits = net(x)[:, :-1].float()
        targets = next_token_targets(x).flatten()
        return mean_cross_entropy(
            logits.flatten(0, 1), targets, IGNORED_TOKEN, self.label_smoothing
        )

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        assert isinstance(x, dict)
        log_likelihoods, counts = [], []
        for start in range(0, len(x["input_ids"]), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            chunk = cut_padding({name: tensor[rows] for name, tensor in x.items()})
            truth = next_token_targets(chunk)
            losses = F.cross_entropy(
                net(chunk)[:, :-1].float().transpose(1, 2),
                truth,
                ignore_index=IGNORED_TOKEN,
                reduction="none",
            )
            log_likelihoods.append(-losses.sum(1))
            counts.append((truth != IGNORED_TOKEN).sum(1))
        return {"log_likelihood": torch.cat(log_likelihoods), "tokens": torch.cat(counts)}

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """The perplexity, and its negative logarithm: the mean log-likelihood of a token."""
        results = self.example_results(pairs)
        return self.score_results(results, torch.ones_like(results["tokens"]))

    def example_results(self, pairs: Iterable[tuple[Any, Any]]) -> ExampleResults:
        """Each text's `log_likelihood` and number of `tokens`, as `predict` gives them."""
        likelihood, tokens = _concatenate_pairs(pairs)
        return {"log_likelihood": likelihood, "tokens": tokens}

    def score_results(self, results: ExampleResults, counts: Tensor) -> dict[str, float]:
        likelihood = (results["log_likelihood"].double() * counts).sum()
        mean = likelihood / (results["tokens"] * counts).sum().clamp(min=1)
        return {"negative_log_perplexity": float(mean), "perplexity": float((-mean).exp())}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        """The texts with the lowest log-likelihood per token, as the model saw them."""
        likelihood, tokens = _concatenate_pairs(pairs)
        per_token = likelihood / tokens.clamp(min=1)
        worst = per_token.argsort(stable=True)[:MAX_WORST]
        texts = decode_texts(data.input_spec, data.valid.take(worst, 0).x)
        rows = [
            [f"{per_token[i]:.4f}", int(tokens[i]), text]
            for i, text in zip(worst.tolist(), texts, strict=True)
        ]
        return {"worst.csv": encode_csv(["log_likelihood_per_token", "tokens", "text"], rows)}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return relative_difference(expected, got)

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        input_spec: InputSpec,
    ) -> list[Prediction]:
        """The continuation of each text, until the model ends it or after `max_new_tokens`.

        Of a text that is longer than the model's length the model sees the end.
        """
        assert isinstance(x, dict) and isinstance(input_spec, TextInputSpec)
        tokenizer = load_tokenizer(input_spec.tokenizer_folder)
        prompts: list[list[int]] = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(x["input_ids"], x["attention_mask"], strict=True)
        ]
        for number, text in enumerate(originals):
            if len(prompts[number]) == input_spec.length:  # its end may be cut off in x
                whole = tokenizer(text, verbose=False)["input_ids"]
                prompts[number] = max(prompts[number], whole, key=len)
        continuations = self._continue_texts(function, prompts, input_spec, tokenizer.eos_token_id)
        predictions = []
        for prompt, new_ids in zip(prompts, continuations, strict=True):
            text = tokenizer.decode(new_ids, skip_special_tokens=True)
            values = {
                "continuation": text,
                "prompt_tokens": len(prompt),
                "new_tokens": len(new_ids),
            }
            predictions.append(Prediction(text.replace("\n", "\\n"), values))
        return predictions

    def _continue_texts(
        self,
        function: Callable[[TensorTree], TensorTree],
        prompts: Sequence[list[int]],
        input_spec: TextInputSpec,
        eos_id: int | None,
    ) -> list[list[int]]:
        """The new ids of each prompt. An empty prompt starts with the end-of-text token."""
        generator = torch.Generator().manual_seed(self.seed)
        texts = [list(prompt) or [eos_id or 0] for prompt in prompts]
        new_ids: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        for _ in range(self.max_new_tokens):
            if not unfinished:
                break
            x, last = _pad_ids([texts[i][-input_spec.length :] for i in unfinished])
            logits = function(x)
            assert isinstance(logits, Tensor)
            last_logits = logits[torch.arange(len(unfinished)), last].float()
            next_ids = self._draw_next(last_logits, generator)
            for i, token_id in zip(unfinished, next_ids, strict=True):
                new_ids[i].append(token_id)
                texts[i].append(token_id)
            unfinished = [i for i in unfinished if new_ids[i][-1] != eos_id]
        return new_ids

    def _draw_next(self, logits: Tensor, generator: torch.Generator) -> list[int]:
        """One id for each row of logits, (n, vocabulary)."""
        values, ids = logits.topk(min(self.top_k, logits.shape[1]))
        drawn = torch.multinomial((values / self.temperature).softmax(1), 1, generator=generator)
        return [int(i) for i in ids.gather(1, drawn)]


def next_token_targets(x: TensorTree) -> Tensor:
    """The token that follows each token, int64 (n, length - 1); IGNORED_TOKEN for padding."""
    assert isinstance(x, dict)
    return x["input_ids"].masked_fill(x["attention_mask"] == 0, IGNORED_TOKEN)[:, 1:]


def _pad_ids(texts: Sequence[list[int]]) -> tuple[TensorTree, Tensor]:
    """Texts of different lengths as a tensor tree, and the position of each text's last token.

    They are padded on the right, to at least two tokens.
    """
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.zeros(len(texts), max(2, int(lengths.max())), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    return {"input_ids": ids, "attention_mask": mask}, lengths - 1


def _concatenate_pairs(pairs: Iterable[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Log-likelihoods and numbers of tokens of all texts, on the CPU."""
    predictions = [predicted for predicted, _ in pairs]
    log_likelihoods = torch.cat([prediction["log_likelihood"] for prediction in predictions])
    tokens = torch.cat([prediction["tokens"] for prediction in predictions])
    return log_likelihoods.cpu(), tokens.cpu()
