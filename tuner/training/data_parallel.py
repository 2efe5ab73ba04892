"""One training in several processes, each on a GPU of its own: ranks.

Each rank has the whole model and takes its share of every batch. torch's DistributedDataParallel
averages the gradients while they are computed (Li et al., PyTorch Distributed, VLDB 2020), so each
rank makes the same step. Rank 0 alone validates, reports, writes checkpoints and decides when the
training ends; before each epoch it tells the others through a store. `rank_launcher` starts ranks.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tuner.core.types import Batch
from tuner.training.batch_mixing import BatchMixing

MIN_SHARE = 2  # examples of a batch for each rank: BatchNorm cannot train on one
SEED_STRIDE = 15_485_863  # between the random states of ranks, so that their dropout differs
# engine.stall looks for what hangs; a rank may wait while rank 0 fills a cache or validates
PATIENCE = timedelta(days=30)
GOES_ON, ENDS = "goes on", "ends"

LossParts = dict[str, Tensor]
"""Scalar tensors by name; their sum is what training minimises."""


class Dismissed(Exception):
    """The training has ended, and rank 0 does the rest alone."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, and the place of this one among them.

    `store` has what rank 0 announces; None where the process is alone.
    """

    rank: int = 0
    count: int = 1
    store: "torch._C._distributed_c10d.Store | None" = None
    _trainings: "itertools.count[int]" = field(default_factory=itertools.count, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process validates, reports and writes files."""
        return self.rank == 0

    def shares(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """What this rank takes of the batches of a step, and the weight of the mean loss over it.

        The mean over the ranks of weight x loss is the mean loss of all examples of the step. Where
        a batch is too small for MIN_SHARE examples a rank, every rank takes all of the step.

        Args:
            batches: int64 indices.
        """
        if self.count == 1 or min(map(len, batches)) < MIN_SHARE * self.count:
            return list(batches), 1.0
        own = [torch.tensor_split(batch, self.count)[self.rank] for batch in batches]
        return own, self.count * sum(map(len, own)) / sum(map(len, batches))

    def synchronize(self, net: nn.Module) -> None:
        """Gives the net of every rank the parameters and buffers of rank 0."""
        if self.count > 1:
            for value in net.state_dict().values():
                distributed.broadcast(value, 0)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the ranks' values."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.count
        return value

    def begin_training(self) -> "TrainingTurns":
        """Every rank begins its trainings in the same order."""
        return TrainingTurns(self, next(self._trainings))


@dataclass
class TrainingTurns:
    """Whether a training goes on with its next epoch: rank 0 announces it, the others hear it."""

    ranks: Ranks
    training: int
    announced: int = 0

    def goes_on(self, epoch: int) -> bool:
        """Whether `epoch` is trained. Rank 0 says so by asking; the other ranks wait for that.

        Raises RuntimeError where the ranks do not continue from the same epoch.
        """
        store = self.ranks.store
        if store is None:
            return True
        self.announced += 1
        key = f"training {self.training}, turn {self.announced}"
        if self.ranks.is_first:
            store.set(key, f"{GOES_ON} {epoch}")
            return True
        store.wait([key], PATIENCE)
        said: str = store.get(key).decode()
        if said not in (ENDS, f"{GOES_ON} {epoch}"):
            raise RuntimeError(f"rank {self.ranks.rank} is at epoch {epoch}; rank 0 {said}")
        return said != ENDS

    def end(self) -> None:
        """Rank 0 trains no further epoch, for whatever reason."""
        if self.ranks.store is not None and self.ranks.is_first:
            self.ranks.store.set(f"training {self.training}, turn {self.announced + 1}", ENDS)


ALONE = Ranks()
_joined = [ALONE]


def joined_ranks() -> Ranks:
    """The ranks that this process has joined."""
    return _joined[-1]


def join_ranks(rank: int, count: int, meeting_file: Path) -> Ranks:
    """Makes this process one of `count` ranks of this machine. They meet in a new file.

    They exchange gradients by NCCL between GPUs and by gloo between CPUs.
    """
    store = distributed.FileStore(str(meeting_file), count)  # type: ignore[attr-defined]
    store.set_timeout(PATIENCE)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=count, timeout=PATIENCE
    )
    announcements = distributed.PrefixStore("tuner", store)  # type: ignore[attr-defined]
    _joined.append(Ranks(rank, count, announcements))
    return _joined[-1]


def leave_ranks() -> None:
    """Undoes `join_ranks`."""
    _joined.pop()
    distributed.destroy_process_group()


class StepLosses(nn.Module):
    """The parts of a task's loss as one module, so that its backward pass can be shared.

    Args:
        net: What is trained.
        loss_parts: The task's function of net and batch.
    """

    def __init__(self, net: nn.Module, loss_parts: Callable[[nn.Module, Batch], LossParts]) -> None:
        super().__init__()
        self.net, self.loss_parts = net, loss_parts

    def forward(self, batch: Batch, mixing: BatchMixing | None = None) -> LossParts:
        if mixing is None:
            return self.loss_parts(self.net, batch)
        return mixing.loss_parts(self.loss_parts, self.net, batch)


def make_losses(
    net: nn.Module, loss_parts: Callable[[nn.Module, Batch], LossParts], ranks: Ranks
) -> nn.Module:
    """What gives the parts of a batch's loss. With several ranks, their gradients are averaged.

    All that will ever be trained must require gradients now. What gets none in a step, as a stage
    that waits to be unfrozen or a detector's branch without an object, is looked for in each step.
    Running statistics are those of rank 0.
    """
    losses = StepLosses(net, loss_parts)
    if ranks.count == 1:
        return losses
    return DistributedDataParallel(losses, find_unused_parameters=True)


def without_exchange(losses: nn.Module) -> AbstractContextManager[None]:
    """A context in which gradients are added up and not yet averaged over the ranks."""
    if isinstance(losses, DistributedDataParallel):
        return losses.no_sync()
    return nullcontext()
