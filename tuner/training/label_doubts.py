"""Labels that the data speak against, found as in confident learning (Northcutt, Jiang and Chuang,
Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 70, 2021).

Each example gets the probabilities of classes from a linear probe that was not solved on it. The
threshold of a class is its mean self-confidence: the mean probability of the class over the
examples that are labelled with it. A label is doubted where another class is the most probable one
and reaches its threshold, and the label's own probability is below the threshold of its class.

A probe on few examples spreads its probability over several other classes, so that none reaches its
threshold. Therefore, unlike in the paper, a label is doubted too where another class is the most
probable one and the label's own probability is below LOW times the threshold of its class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.core.types import Batch
from tuner.training.linear_probe import LayerExamples, solve_output_layer

FOLDS = 5
SEED = 0  # of the folds
LOW = 0.1  # of a class's threshold; below it a label is doubted whatever is likely instead


@dataclass(frozen=True)
class DoubtedLabel:
    """An example whose label is doubted, by its row.

    `given` and `likely` are classes, with their probabilities.
    """

    row: int
    given: int
    likely: int
    given_probability: float
    likely_probability: float


def deal_folds(labels: Tensor) -> Tensor:
    """The fold of each example, int64 (n,), 0 to FOLDS - 1, each class in proportion.

    Args:
        labels: int64 (n,).
    """
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[order] = torch.arange(len(labels)) % FOLDS
    return folds


def estimate_out_of_fold(features: Tensor, labels: Tensor, class_count: int) -> Tensor:
    """The probabilities of classes from probes that were solved without the example.

    The penalty of each probe is chosen on one of the other folds, and the probe is then solved on
    all of them.

    Args:
        features: float32 (n, features).
        labels: int64 (n,), on the device of the features.
        class_count: The number of classes.

    Returns:
        float32 (n, class_count), on the CPU.
    """
    folds = deal_folds(labels.cpu()).to(features.device)
    probabilities = torch.empty(len(labels), class_count)
    examples = LayerExamples(features, labels)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(features.shape[1], class_count, device=features.device)
    for fold in range(FOLDS):
        judging = folds == (fold + 1) % FOLDS
        held_out = (folds == fold).nonzero().flatten()
        train = examples.select(((folds != fold) & ~judging).nonzero().flatten())
        valid = examples.select(judging.nonzero().flatten())
        solve_output_layer(layer, _loss, train, valid, join_valid=True)
        with torch.no_grad():
            probabilities[held_out.cpu()] = layer(features[held_out]).softmax(1).cpu()
    return probabilities


def _loss(net: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(batch.y, Tensor)
    return nn.functional.cross_entropy(net(batch.x), batch.y)


def find_doubted_labels(probabilities: Tensor, labels: Tensor) -> list[DoubtedLabel]:
    """The doubted labels, the least probable one first.

    Args:
        probabilities: float32 (n, classes), each from a model that has not seen the example.
        labels: int64 (n,).
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    class_count = probabilities.shape[1]
    counts = torch.bincount(labels, minlength=class_count)
    sums = torch.zeros(class_count).index_add_(0, labels, own)
    thresholds = sums / counts.clamp(min=1)
    thresholds[counts == 0] = 1.0  # a class without examples is nobody's likely label
    highest, likely = probabilities.max(1)
    is_likely = (highest >= thresholds[likely]) & (own < thresholds[labels])
    doubted = (likely != labels) & (is_likely | (own < LOW * thresholds[labels]))
    rows = doubted.nonzero().flatten()
    rows = rows[own[rows].argsort(stable=True)]
    return [
        DoubtedLabel(row, int(labels[row]), int(likely[row]), float(own[row]), float(highest[row]))
        for row in rows.tolist()
    ]
