"""The Ray engine on a real cluster of this machine: nodes that come and go, what travels to them, and what is refused."""

import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.conftest import SMALL
from tests.helpers.jobs import checkpoint
from tuner.config import plugins
from tuner.config.requirements import pip_install
from tuner.config.run import EngineSettings
from tuner.errors import StorageError
from tuner.files.atomic import file_sha256
from tuner.jobs import Job, Outcome, RunJobs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
MEMORY = 80 * 2**20  # bytes of each node's object store
ROOT = str(Path(tuner.__file__).parents[1])


def alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes() != b""
        )  # a dying process has no memory left
    except OSError:
        return False


def until(happens: Callable[[], Any], seconds: float = 60) -> Any:
    """Waits for something to be true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores and two nodes with one core each; no process of it is left afterwards."""
    from tuner.engines import _ray_cluster

    _ray_cluster.import_ray(local=True)  # token and loopback, which Ray reads when it is loaded
    from ray.cluster_utils import Cluster

    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
        "health_check_timeout_ms": 2000,
    }
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": MEMORY,
        "_system_config": health,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    began = {
        info.process
        for node in [cluster.head_node, *cluster.worker_nodes]
        for infos in node.all_processes.values()
        for info in infos
    }
    yield cluster
    nodes = [cluster.head_node, *cluster.worker_nodes]
    began |= {
        info.process for node in nodes for infos in node.all_processes.values() for info in infos
    }
    cluster.shutdown()
    for process in began:
        process.wait(20)  # a raylet that is left fails here


@pytest.fixture
def whole(cluster: Any) -> Iterator[Any]:
    """The cluster with its two nodes, however it was left."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    yield cluster
    while len(cluster.worker_nodes) > 2:
        gone(cluster)


def gone(cluster: Any, node: Any = None) -> None:
    node = node or next(iter(cluster.worker_nodes))
    processes = [info.process for infos in node.all_processes.values() for info in infos]
    cluster.remove_node(node, allow_graceful=False)
    for process in processes:
        process.wait(20)


@contextlib.contextmanager
def joined(
    cluster: Any, warnings: list[str] | None = None, *, silence: float = 60.0, **settings: Any
) -> Iterator[RunJobs]:
    engine = EngineSettings(name="ray", address=cluster.address, **settings)
    with plugins.load_plugin("engine", "ray")(
        engine, (warnings if warnings is not None else []).append, silence=silence
    ) as carry:
        yield carry


def carry_all(
    carry: RunJobs,
    jobs: list[Job],
    report: Callable[[Job, Any], bool] = lambda job, value: True,
    workers: int = 2,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, Outcome]:
    ended: dict[int, Outcome] = {}
    queue = iter(jobs)

    def over(job: Job, outcome: Outcome) -> None:
        assert job.number not in ended  # once
        ended[job.number] = outcome

    carry(lambda: next(queue, None), report, over, go_on, workers)
    return ended


def node_of(cluster: Any, pid: int) -> Any:
    """The node whose raylet started a worker."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return next(
        n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == parent
    )


# -- what goes wrong while jobs run


def test_a_node_that_is_removed_costs_its_job_an_attempt(whole: Any) -> None:
    def report(job: Job, pid: int) -> bool:
        if job.number == 0 and len(whole.worker_nodes) == 2:
            gone(whole, node_of(whole, pid))
        return True

    with joined(whole) as carry:
        ended = carry_all(
            carry, [Job(i, "tests.helpers.jobs:steps", (3, 0.5, None)) for i in range(4)], report
        )
    assert ended[0].kind == "lost" and "node" in ended[0].reason
    assert [ended[i].value for i in (1, 2, 3)] == [3, 3, 3]


def test_a_killed_worker_costs_its_job_an_attempt_and_the_next_job_gets_a_new_one(
    whole: Any,
) -> None:
    with joined(whole) as carry:
        ended = carry_all(
            carry,
            [
                Job(0, "tests.helpers.jobs:die", signal.SIGKILL),
                Job(1, "tests.helpers.jobs:count", 1),
            ],
            workers=1,
        )
    assert (
        ended[0].kind == "lost" and "the worker on node" in ended[0].reason and ended[1].value == 1
    )


def test_workers_that_stop_or_hang_are_given_up_and_end(whole: Any) -> None:
    """A stopped worker on a living node, and a training that waits for ever; one that computes long is left alone."""
    pids: dict[int, int] = {}

    def report(job: Job, value: int) -> bool:
        pids.setdefault(job.number, value)
        return True

    with joined(whole, silence=4.0) as carry:
        jobs = [
            Job(0, "tests.helpers.jobs:stop", 3),
            Job(1, "tests.helpers.jobs:wait", None, stall=1.0),
            Job(2, "tests.helpers.jobs:wait", 6.0),
            Job(3, "tests.helpers.jobs:count", 2),
        ]
        ended = carry_all(carry, jobs, report)
        assert {number: (o.kind, o.loss_cause) for number, o in ended.items()} == {
            0: ("lost", "silent"),
            1: ("lost", "stalled"),
            2: ("done", ""),
            3: ("done", ""),
        }
        assert "the worker on node" in ended[0].reason and "silent for 4 s" in ended[0].reason
        until(lambda: not alive(pids[0]) and not alive(pids[1]))


def test_when_all_nodes_are_gone_jobs_wait_for_one_that_comes(whole: Any) -> None:
    warnings: list[str] = []
    left: list[float] = []

    def report(job: Job, pid: int) -> bool:
        if job.number == 0 and not left:
            gone(whole, node_of(whole, pid))
            while whole.worker_nodes:
                gone(whole)
            left.append(time.monotonic())
        return True

    def go_on() -> bool:
        if left and not whole.worker_nodes and time.monotonic() - left[0] > 6:
            whole.add_node(num_cpus=1, object_store_memory=MEMORY)
        return True

    with joined(whole, warnings) as carry:
        ended = carry_all(
            carry,
            [Job(i, "tests.helpers.jobs:steps", (3, 1, None)) for i in range(3)],
            report,
            1,
            go_on,
        )
    assert ended[0].kind == "lost" and [ended[i].kind for i in (1, 2)] == ["done", "done"]
    assert sum("waiting for one to join" in w for w in warnings) == 1


def test_nodes_that_join_are_used(whole: Any) -> None:
    def report(job: Job, pid: int) -> bool:
        if len(whole.worker_nodes) == 2:
            whole.add_node(num_cpus=1, object_store_memory=MEMORY)
        pids.setdefault(pid, time.monotonic())
        return True

    pids: dict[int, float] = {}
    with joined(whole) as carry:
        ended = carry_all(
            carry,
            [Job(i, "tests.helpers.jobs:steps", (4, 1, None)) for i in range(8)],
            report,
            workers=1_000_000,
        )
    assert {o.value for o in ended.values()} == {4} and len(pids) == 3


def test_a_stopped_coordinator_does_not_stop_its_workers(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "steps"
    code = (
        "import sys\nfrom tuner.config import plugins\nfrom tuner.jobs import Job\nfrom tuner.config.run import EngineSettings\n"
        "heard = []\n"
        "with plugins.load_plugin('engine', 'ray')(EngineSettings(name='ray', address=sys.argv[1])) as carry:\n"
        "    jobs = iter([Job(0, 'tests.helpers.jobs:impatient_steps', (9, 0.5, sys.argv[2]))])\n"
        "    carry(lambda: next(jobs, None), lambda j, v: not heard.append(v), lambda j, o: print(o.kind, o.value, len(heard)), lambda: True, 1)\n"
    )
    driver = child(["-c", code, whole.address, path], tmp_path)
    until(lambda: path.exists() and len(path.read_text().splitlines()) >= 3)
    os.kill(driver.pid, signal.SIGSTOP)
    until(lambda: len(path.read_text().splitlines()) >= 6)
    os.kill(driver.pid, signal.SIGCONT)
    out, _ = driver.communicate(timeout=60)
    assert out.split() == ["done", "9", "9"], out  # and no report is lost


def test_a_zombie_is_fenced(whole: Any, tmp_path: Path) -> None:
    """A node that is cut off (stopped) for longer than the cluster waits: its job is lost, its worker ends, its reports count for nothing."""
    pids: list[int] = []
    heard: list[int] = []
    stopped: list[int] = []

    def report(job: Job, pid: int) -> bool:
        heard.append(job.number)
        if not stopped:
            pids.append(pid)
            node = node_of(whole, pid)
            stopped.extend([node.all_processes["raylet"][0].process.pid, pid])
            for each in stopped:
                os.kill(each, signal.SIGSTOP)
            whole.worker_nodes.remove(node)
            left.append(node)
        return True

    left: list[Any] = []
    with joined(whole) as carry:
        ended = carry_all(
            carry,
            [
                Job(0, "tests.helpers.jobs:steps", (100, 0.2, None)),
                Job(1, "tests.helpers.jobs:steps", (2, 0.2, None)),
            ],
            report,
            workers=1,
        )
        assert ended[0].kind == "lost" and ended[1].kind == "done"
        before = len(heard)
        for each in stopped:
            os.kill(each, signal.SIGCONT)
        until(
            lambda: left[0].all_processes["raylet"][0].process.poll() is not None
        )  # Ray ends a node that was given up
        until(lambda: not alive(pids[0]))
        carry_all(carry, [Job(2, "tests.helpers.jobs:count", 1)], report)
        assert heard[before:] == [2]
    for infos in left[0].all_processes.values():
        for info in infos:
            info.process.kill()
            info.process.wait(20)


def test_an_answer_to_a_job_that_is_gone_is_not_taken() -> None:
    from tuner.engines._ray_worker import RayWorker

    slot = RayWorker(os.getcwd(), [], 1, 1)
    stream = slot.run_job(Job(0, "tests.helpers.jobs:count", 2), "new", [], 60.0)
    assert next(stream)[0] == "alive" and next(stream) == ("report", "new", 1)
    slot.receive_answer("old", False)
    slot.receive_answer("new", True)
    assert next(stream) == ("report", "new", 2)
    slot.receive_answer("new", False)
    assert next(stream)[2] == Outcome("done", 2)


def test_when_time_is_up_a_busy_slot_ends_at_once_and_cleans_up(whole: Any, tmp_path: Path) -> None:
    ended: list[Outcome] = []
    heard: list[int] = []
    jobs = iter([Job(0, "tests.helpers.jobs:held", str(tmp_path / "partial"))])
    with joined(whole) as carry:
        carry(
            lambda: next(jobs, None),
            lambda j, v: not heard.append(v),
            lambda j, o: ended.append(o),
            lambda: not heard,
            1,
        )
    assert [(o.kind, o.reason) for o in ended] == [("lost", "interrupted")]
    assert not (tmp_path / "partial").exists()
    until(lambda: not alive(heard[0]))


# -- whole studies from the command line


def child(words: list[Any], folder: Path, **environment: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": ROOT, **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def study(folder: Path, cluster: Any, *words: str) -> "subprocess.Popen[str]":
    (folder / "small.yaml").write_text(
        SMALL.replace("name: inline", f"name: ray, address: '{cluster.address}'")
    )
    return child(["-u", "-m", "tuner", "run", "small.yaml", "search.retrain=false", *words], folder)


def counted(folder: Path, budget: int) -> None:
    """The study has its budget of trials, and none is left running."""
    import optuna

    from tuner.search import storage

    trials = optuna.load_study(
        study_name="small", storage=storage.open_storage(None, folder / "studies" / "small")
    ).trials
    assert all(t.state.is_finished() for t in trials)
    final = [
        t
        for t in trials
        if t.state.name in ("COMPLETE", "PRUNED") or t.user_attrs.get("tuner:final")
    ]
    assert (
        len(final) == budget
        and sum(t.state.name in ("COMPLETE", "PRUNED") for t in trials) >= budget - 1
    )


def test_a_killed_driver_leaves_no_worker_and_its_command_continues(
    whole: Any, tmp_path: Path
) -> None:
    first = study(tmp_path, whole)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("#0 "):
            break
    assert slots(whole)
    first.kill()
    first.communicate()
    until(lambda: not slots(whole))
    out, _ = (second := study(tmp_path, whole)).communicate(timeout=200)
    assert second.returncode == 0, out
    counted(tmp_path, 4)


def slots(cluster: Any) -> list[str]:
    """What this cluster's nodes run as slots."""
    raylets = ",".join(str(n.all_processes["raylet"][0].process.pid) for n in cluster.worker_nodes)
    found = subprocess.run(
        ["ps", "--ppid", raylets, "-o", "args="], capture_output=True, text=True, check=False
    ).stdout
    return [line for line in found.splitlines() if line.startswith("ray::RayWorker")]


@pytest.mark.timeout(480)
def test_nodes_that_are_killed_at_random_cost_no_trial(whole: Any, tmp_path: Path) -> None:
    import random

    draw = random.Random(0)
    process = study(
        tmp_path,
        whole,
        "search.trials=8",
        "recipe.epochs=6",
        "data.examples=400",
        "search.retries=10",
        "search.pruner=none",
    )
    end = time.monotonic() + 30
    kills = 0
    while time.monotonic() < end and process.poll() is None:
        time.sleep(draw.uniform(2, 5))
        if draw.random() < 0.7 and whole.worker_nodes:
            gone(whole, draw.choice(sorted(whole.worker_nodes, key=id)))
            kills += 1
        if len(whole.worker_nodes) < 2:
            whole.add_node(num_cpus=1, object_store_memory=MEMORY)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and kills > 2, (kills, out)
    assert "raylet" not in out and "Traceback" not in out
    counted(tmp_path, 8)


def test_ctrl_c_ends_a_local_ray_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        SMALL.replace("name: inline", "name: ray, address: local").replace(
            "low: 1, high: 3", "low: 400, high: 500"
        )
    )
    process = child(["-u", "-m", "tuner", "run", "small.yaml", "data.examples=400"], tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("search "):
            break
    time.sleep(3)
    inside = [
        int(p)
        for p in subprocess.run(
            ["pgrep", "-s", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
    ]
    assert len(inside) > 3
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and "tuner: error: interrupted" in out and "Traceback" not in out
    ), out
    until(lambda: not any(alive(pid) for pid in inside))


# -- every node


def test_a_job_for_everywhere_runs_once_on_every_node_and_ends_once(
    whole: Any, tmp_path: Path
) -> None:
    path = tmp_path / "seen"
    with joined(whole) as carry:
        ended = carry_all(
            carry,
            [Job(0, "tests.helpers.jobs:steps", (1, 0.0, str(path)), on_every_node=True)],
            workers=1,
        )
        assert ended[0].value == 1 and len(path.read_text().splitlines()) == 2
        whole.add_node(num_cpus=1, object_store_memory=MEMORY)
        time.sleep(1.5)
        jobs = [Job(i, "tests.helpers.jobs:steps", (2, 0.5, None)) for i in range(8)]
        assert {o.kind for o in carry_all(carry, jobs, workers=3).values()} == {"done"}
        assert (
            len(path.read_text().splitlines()) == 3
        )  # the node that came was checked before its first job


def test_a_slot_does_not_import_from_the_current_folder(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    for name in ("torch", "numpy", "pydantic", "yaml", "tuner"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with joined(whole) as carry:
        ended = carry_all(carry, [Job(0, "tests.helpers.jobs:threads", None)], workers=1)
    assert ended[0].kind == "done" and not mark.exists()


def test_nodes_that_disagree_are_both_named(whole: Any) -> None:
    with joined(whole) as carry:
        ended = carry_all(
            carry, [Job(0, "tests.helpers.jobs:where", None, on_every_node=True)], workers=1
        )
    assert (ended[0].kind, ended[0].reason, ended[0].exit_code) == ("refused", "DataError", 3)
    assert ended[0].problems[0].count("/") == 2 and "find different data" in ended[0].problems[0]


def test_slots_of_a_node_share_its_cache_which_is_filled_once(cluster: Any, tmp_path: Path) -> None:
    from tuner.config import parsing
    from tuner.messages import Assignment

    (tmp_path / "x.yaml").write_text(SMALL)
    space = parsing.load_space(
        tmp_path / "x.yaml",
        ["recipe.freeze_depth=5", "recipe.epochs=2", "engine.cache=always", "recipe.optimizer=sgd"],
    )
    run = (
        space.sample(None, seed=0)
        if not space.dimensions
        else next(iter(space.plugin_combinations()))
    )
    order = Assignment(run, "accuracy", space.settings.engine, str(tmp_path / "home"))
    path = tmp_path / "fills"
    while cluster.worker_nodes:
        gone(cluster)
    cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
    with joined(cluster) as carry:
        ended = carry_all(
            carry,
            [Job(i, "tests.helpers.jobs:filling", (order, str(path))) for i in range(4)],
            workers=2,
        )
    assert {o.kind for o in ended.values()} == {"done"}, ended
    fills = path.read_text().split()
    assert fills and len(fills) == len(set(fills))
    gone(cluster)


# -- a node that does not see our files


@contextlib.contextmanager
def blind(cluster: Any, folder: Path) -> Iterator[None]:
    """A node of its own whose `folder` is empty and its own: a mount that only it has."""
    while cluster.worker_nodes:
        gone(cluster)

    def start() -> Any:
        private = 0x00020000  # CLONE_NEWNS: this thread's mounts, and those of what it starts, become its own
        if ctypes.CDLL(None).unshare(private) != 0:
            pytest.skip("needs root, to give a node a mount of its own")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
        return cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    cluster._shutdown_at_exit = False  # signal handlers are for the main thread only
    try:
        with ThreadPoolExecutor(1) as thread:  # gone with its namespace afterwards
            node = thread.submit(start).result()
    finally:
        cluster._shutdown_at_exit = True
    try:
        yield
    finally:
        gone(cluster, node)


def test_what_a_node_lacks_is_named_or_shipped(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.engines._file_chunks.CHUNK_BYTES", 1000)
    unseen = tmp_path / "disk"
    data = unseen / "photos"
    (data / "cat" / "empty").mkdir(parents=True)
    (data / "cat" / "1.jpg").write_bytes(bytes(range(256)) * 20)
    (data / "2.jpg").write_bytes(b"")
    (unseen / "weights.bin").write_bytes(b"w" * 5000)
    paths = (str(data), str(unseen / "weights.bin"))
    look = Job(
        0, "tests.helpers.jobs:listing", str(unseen), on_every_node=True, folders_needed=paths
    )
    with blind(cluster, unseen):
        with joined(cluster) as carry:
            assert carry_all(
                carry, [Job(0, "tests.helpers.jobs:listing", str(data), folders_needed=paths)]
            )[0].problems == (f"{data} does not exist",)
        with joined(cluster, ship=True) as carry:
            found = carry_all(carry, [look])[0].value
        assert found == {
            "photos/cat/1.jpg": bytes(range(256)) * 20,
            "photos/2.jpg": b"",
            "weights.bin": b"w" * 5000,
        }


def test_a_kept_folder_survives_its_node(cluster: Any, tmp_path: Path) -> None:
    unseen = tmp_path / "disk"
    keep = unseen / "study" / "trial0"
    unseen.mkdir()
    with blind(cluster, unseen), joined(cluster) as carry:
        first = carry_all(
            carry,
            [Job(0, "tests.helpers.jobs:remember", (str(keep), -3), folders_to_keep=(str(keep),))],
        )[0]
        assert first.kind == "lost"
        assert (
            sorted(p.name for p in keep.iterdir()) == [checkpoint(1), checkpoint(2)]
            and (keep / checkpoint(2)).read_bytes() == b"\2" * 1000
        )
    with blind(cluster, unseen), joined(cluster) as carry:  # another node
        second = carry_all(
            carry,
            [Job(0, "tests.helpers.jobs:remember", (str(keep), 2), folders_to_keep=(str(keep),))],
        )[0]
    assert second.value == [checkpoint(1), checkpoint(2)]


@pytest.mark.timeout(480)
def test_a_whole_study_on_a_node_that_shares_no_file(cluster: Any, tmp_path: Path) -> None:
    """Photographs go there, checkpoints and the winner's weights come back: exported and verified as from this machine.

    The winner is exported as its trial left it, and then confirmed and trained again.
    """
    import numpy
    from PIL import Image

    disk = tmp_path / "disk"
    draw = numpy.random.default_rng(0)
    for shade, name in enumerate(("dark", "grey", "light")):
        (disk / "photos" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(
                draw.integers(80 * shade, 80 * shade + 70, (32, 32, 3), dtype="uint8")
            ).save(disk / "photos" / name / f"{i}.png")
    text = SMALL.replace(
        "{name: synthetic, examples: 60, classes: 3, size: 32}",
        "{name: folder, path: photos, size: 32}",
    )
    (disk / "small.yaml").write_text(
        text.replace("name: inline", f"name: ray, address: '{cluster.address}', ship: true")
    )
    model = disk / "studies" / "small" / "export" / "model.safetensors"
    digests = set()
    with blind(cluster, disk):
        for more in ("search.retrain=false", "search.confirm={top: 2, repeats: 1}"):
            words = ["-u", "-m", "tuner", "run", "small.yaml", "search.trials=2", more]
            process = child(words, disk, TUNER_HOME=str(disk / "home"))
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0, out
            assert "model.safetensors" in out and "verified to" in out, out
            digests.add(file_sha256(model))
    counted(disk, 2)
    assert model.stat().st_size > 1e6 and len(digests) == 2


# -- refused before the first trial


def refused(address: str, folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    (folder / "small.yaml").write_text(
        SMALL.replace("name: inline", f"name: ray, address: '{address}'")
    )
    process = child(["-m", "tuner", "run", "small.yaml", *words], folder, **environment)
    out, _ = process.communicate(timeout=120)
    assert not (folder / "studies").exists()
    return process.returncode, out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gpus_per_trial": 0.3}, "engine.gpus_per_trial: 0.3, but the cluster has no GPU ("),
        ({"cpus_per_trial": 64}, "engine.cpus_per_trial: 64, but no node has so many"),
    ],
)
def test_what_the_cluster_does_not_have_is_named(
    whole: Any, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(StorageError) as error, joined(whole, **settings):
        pass
    assert str(error.value).startswith(expected) and "1 CPUs, 0 GPUs" in str(error.value)


def test_a_wrong_address_and_a_wrong_token_are_named(whole: Any, tmp_path: Path) -> None:
    code, out = refused("127.0.0.1:9", tmp_path)
    assert (
        code == 4
        and "tuner: error: engine.address: no Ray cluster answers at 127.0.0.1:9" in out
        and len(out.splitlines()) == 1
    )
    code, out = refused(whole.address, tmp_path, RAY_AUTH_TOKEN="ab" * 32)
    assert (
        code == 4
        and "does not take this machine's token; set RAY_AUTH_MODE=token" in out
        and len(out.splitlines()) == 1
    )


def test_another_version_of_ray_is_named(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.1.0")
    with (
        pytest.raises(
            StorageError, match=r"(?s)engine.address: .*Version mismatch.*2\.1\.0.*same versions"
        ),
        joined(whole),
    ):
        pass


def test_another_version_of_tuner_is_named(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "__version__", "99")
    with (
        joined(whole) as carry,
        pytest.raises(
            StorageError,
            match=r"node .*: it has tuner .*, this machine 99; install the same version",
        ),
    ):
        carry_all(carry, [Job(0, "tests.helpers.jobs:count", 1)])


def test_ray_that_is_not_installed_says_which_extra(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError")
    (tmp_path / "small.yaml").write_text(SMALL.replace("name: inline", "name: ray, address: local"))
    process = child(["-m", "tuner", "run", "small.yaml"], tmp_path)
    out, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 4
        and out == f"tuner: error: engine.name: ray needs the package ray: {pip_install('ray')}\n"
    )


@pytest.mark.parametrize(
    ("loopback", "expected"),
    [
        (False, "tuner: error: .* asks nobody for a token, so anyone can run code on it"),
        (True, "tuner: warning: .* asks nobody for a token, so every user of this machine can"),
    ],
)
def test_a_cluster_that_asks_for_no_token_is_refused_or_on_loopback_warned_of(
    loopback: bool, expected: str, tmp_path: Path
) -> None:
    own = ["127.0.0.1"]
    if not loopback:
        own = subprocess.run(
            ["hostname", "-I"], capture_output=True, text=True, check=True
        ).stdout.split()
    if not own:
        pytest.skip("this machine has no address but loopback")
    address = f"{own[0]}:{46380 if loopback else 46379}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--node-ip-address={own[0]}", f"--port={address.rpartition(':')[2]}"]
    command += ["--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    head = subprocess.Popen(
        command,
        env=clean | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        time.sleep(6)
        words = ["engine.gpus_per_trial=0.3"]  # of which there are none: nothing begins
        code, out = refused(address, tmp_path, *words, RAY_AUTH_MODE="disabled")
        assert code == 4 and re.search(expected, out), out
    finally:
        head.terminate()
        head.wait(30)
