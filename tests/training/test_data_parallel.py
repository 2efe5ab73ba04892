"""One training by several ranks: it is the training of one process, also when it is killed and continued. Real processes, over gloo."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import rank_trainings
from tests.helpers.forked_commands import ForkServer, forks
from tuner.training.data_parallel import Ranks

HERE = "tests.helpers.rank_trainings"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with forks() as found:
        yield found


def train(
    server: ForkServer, folder: Path, name: str, ranks: int, parts: int = 1, last: int = 0
) -> Any:
    code, said = server.call_function(
        folder, f"{HERE}:train", str(folder), name, ranks, parts, last
    )
    assert code == (137 if last else 0), said
    return None if last else json.loads(said.splitlines()[-1])


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains(server: ForkServer, tmp_path: Path) -> None:
    """Shares of uneven size, accumulated gradients, micro-batches, clipping, an average of the weights, stages that wait."""
    alone = train(server, tmp_path, "alone", 1)
    together = train(server, tmp_path, "together", 2, parts=2)
    for (loss, scores), (same_loss, same_scores) in zip(alone, together, strict=True):
        assert same_loss == pytest.approx(loss, rel=1e-5) and same_scores.keys() == scores.keys()
        assert same_scores["log_loss"] == pytest.approx(scores["log_loss"], rel=1e-4)
    expected = rank_trainings.weights(tmp_path, "alone")
    for name, value in rank_trainings.weights(tmp_path, "together").items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


@pytest.mark.slow
def test_ranks_that_are_killed_go_on_as_if_they_had_not_been(
    server: ForkServer, tmp_path: Path
) -> None:
    calm = train(server, tmp_path, "calm", 2)
    train(server, tmp_path, "killed", 2, last=2)
    killed = train(server, tmp_path, "killed", 2)
    assert killed == calm
    expected = rank_trainings.weights(tmp_path, "calm")
    for name, value in rank_trainings.weights(tmp_path, "killed").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("sizes", [[16], [13, 13], [5, 4], [13, 3], [2]])
def test_the_shares_of_all_ranks_are_the_step(sizes: list[int]) -> None:
    batches = [torch.arange(size) + 100 * n for n, size in enumerate(sizes)]
    values = torch.rand(300, generator=torch.Generator().manual_seed(0))
    means, rows = [], []
    for rank in range(2):
        own, weight = Ranks(rank, 2).shares(batches)
        assert all(len(part) >= 2 for part in own)
        rows.append(torch.cat(own))
        means.append(weight * values[rows[-1]].mean())
    assert sum(means) / 2 == pytest.approx(float(values[torch.cat(batches)].mean()))
    assert sorted(set(torch.cat(rows).tolist())) == sorted(torch.cat(batches).tolist())


# -- the launcher


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_are_started_heard_and_ended_together(server: ForkServer, tmp_path: Path) -> None:
    code, said = server.call_function(
        tmp_path, f"{HERE}:launch", str(tmp_path), "report_and_lack_memory", 2
    )
    assert code == 0, said
    expected = {"reports": 2, "mean": 0.5, "slot": 3, "parts": 2}
    assert json.loads(said.splitlines()[-1]) == expected
    code, said = server.call_function(tmp_path, f"{HERE}:launch", str(tmp_path), "fail", 2)
    found = json.loads(said.splitlines()[-1])
    assert found["raised"] == "slot 3 has no luck" and "rank_trainings.py" in found["notes"]
    code, said = server.call_function(tmp_path, f"{HERE}:launch", str(tmp_path), "die", 2)
    assert code == -9, said
