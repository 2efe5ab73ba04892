"""The driver's way into a Ray cluster, and what the nodes there have."""

import contextlib
import ipaddress
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config.requirements import pip_install
from tuner.config.run import EngineSettings
from tuner.errors import StorageError

PING = (
    "import sys; from ray._raylet import GcsClient; "
    "GcsClient(address=sys.argv[1]).check_alive([], timeout=5)"
)
PING_SECONDS = 20.0  # seconds in which a cluster answers; ray.init itself tries for many minutes
TOKEN_HINT = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"


@dataclass(frozen=True)
class Node:
    id: str
    name: str
    cpus: float
    gpus: float

    def capacity(self, cpus: int, gpus: float) -> int:
        """How many trials the whole node holds. A trial's part of a GPU is of one GPU."""
        trials = math.floor(self.cpus / cpus)
        if gpus > 0:
            trials = min(trials, math.floor(self.gpus) * math.floor(1 / gpus + 1e-9))
        return trials


@contextlib.contextmanager
def connect_ray(engine: EngineSettings, warn: Callable[[str], None]) -> Iterator[Any]:
    """Connect the module `ray` to the cluster for the length of the block. Raises StorageError."""
    ray = import_ray(local=engine.address == "local")
    with silence_ray(ray):
        try:
            with preserve_signals():
                if engine.address == "local":
                    start_ray(ray, "local", num_gpus=None, include_dashboard=False)
                else:
                    start_ray(ray, address := find_address(ray, engine.address))
                    require_authentication(address, warn)
            yield ray
        finally:
            disconnect(ray)


def import_ray(*, local: bool) -> Any:
    """Import Ray with usage reports switched off.

    `local`: the cluster is started here and stays on loopback, so that no other machine can join.
    Ray reads these settings from the environment when it is loaded.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if local:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # whatever the system: 127.0.0.1
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # for this command only; other users of the machine do not know it
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # the default of a later version of Ray; where it is not set, Ray warns
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise StorageError(
            f"engine.name: ray needs the package ray: {pip_install('ray')}"
        ) from None
    core: Any = ray._raylet
    # as Ray's own start does: a Ray that was loaded earlier has read the environment already
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()
    return ray


@contextlib.contextmanager
def silence_ray(ray: Any) -> Iterator[None]:
    """Keep Ray from printing about dead workers and nodes: the engine reports them itself."""
    worker = ray._private.worker
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None  # no setting of Ray's reaches it
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextlib.contextmanager
def preserve_signals() -> Iterator[None]:
    """Restore the signal handlers after the block: Ray replaces SIGTERM's when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_ray(ray: Any, address: str, **options: Any) -> None:
    try:
        ray.init(
            address=address,
            job_config=job_config(ray),
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **options,
        )
    except (ray.exceptions.RayError, RuntimeError, ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "ersion mismatch" in reason:
            raise StorageError(
                f"engine.address: {address}: {reason}; "
                "install the same versions of Ray and Python on every machine"
            ) from None
        raise StorageError(f"engine.address: {address}: {reason}") from None


def job_config(ray: Any) -> Any:
    """Ray's job settings, with which its workers do not import from the current folder.

    By default Ray puts the current folder, which may hold any file, first on its workers' path.
    A worker gets this process's path instead, after its own.
    """
    config = ray.job_config.JobConfig()
    config._runtime_env_has_working_dir = lambda: True  # no public setting does it
    return config


def disconnect(ray: Any) -> None:
    """Disconnect, and wait until every process of a cluster that was started here has ended."""
    node = ray._private.worker._global_node
    started = (
        [info.process for infos in node.all_processes.values() for info in infos]
        if node is not None
        else []
    )
    ray.shutdown()
    for process in started:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_address(ray: Any, address_setting: str) -> str:
    """Return HOST:PORT of a cluster that answers and accepts this machine. Raises StorageError."""
    address = address_setting
    if address_setting == "auto":
        named = os.environ.get("RAY_ADDRESS", "auto")
        if "://" in named:
            raise StorageError(
                f"engine.address: auto, but RAY_ADDRESS is {named}; "
                "write HOST:PORT of the cluster's head"
            )
        try:
            address = str(ray._private.services.canonicalize_bootstrap_address_or_die(named))
        except (ConnectionError, ValueError):
            raise StorageError(
                "engine.address: auto, but no Ray cluster runs on this machine; start one with "
                "`ray start --head`, write HOST:PORT of a cluster's head, or local"
            ) from None
    error = ping(address, ray_environment(os.environ))
    if error is None:
        raise StorageError(
            f"engine.address: no Ray cluster answers at {address} within {PING_SECONDS:.0f} s; "
            "is it HOST:PORT of the head (`ray start --head --port=6379`), running, "
            "and not behind a firewall?"
        )
    if error == "AuthenticationError":
        raise StorageError(
            f"engine.address: the Ray cluster at {address} does not take this machine's token; "
            f"{TOKEN_HINT} as on its nodes"
        )
    return address


def require_authentication(address: str, warn: Callable[[str], None]) -> None:
    """Refuse a cluster that asks for no token: whoever reaches it can run code on its nodes.

    Raises StorageError where other machines can reach the cluster. On loopback it only warns, of
    the other users of this machine.
    """
    # without a token of ours the cluster has just accepted this machine
    anonymous = ray_environment(os.environ)["RAY_AUTH_MODE"] == "disabled"
    if not anonymous and ping(address, {**os.environ, "RAY_AUTH_MODE": "disabled"}) != "":
        return
    remedy = f"{TOKEN_HINT} on every node before `ray start`, and here"
    if is_loopback(address):
        warn(
            f"engine.address: the Ray cluster at {address} asks nobody for a token, so every user "
            f"of this machine can run code on it as you; {remedy}"
        )
        return
    raise StorageError(
        f"engine.address: the Ray cluster at {address} can be reached from other machines and asks "
        f"nobody for a token, so anyone can run code on it; {remedy}"
    )


def ray_environment(environment: Any) -> dict[str, str]:
    """The environment as Ray's own programs see it: they use a token where there is one."""
    file = Path.home() / ".ray" / "auth_token"
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys() or file.is_file()
    return {"RAY_AUTH_MODE": "token" if has_token else "disabled", **environment}


def ping(address: str, environment: dict[str, str]) -> str | None:
    """Ask a cluster in a separate process whether it is alive.

    Returns an empty string when it is, the error's name when it refuses this machine, and None when
    nothing answers within PING_SECONDS.
    """
    command = [sys.executable, "-P", "-c", PING, address]
    try:
        process = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PING_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if process.returncode == 0:
        return ""
    return (
        "AuthenticationError"
        if "AuthenticationError" in process.stderr or "Unauthenticated" in process.stderr
        else None
    )


def is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def live_nodes(ray: Any) -> dict[str, Node]:
    """The living nodes by their id."""
    try:
        alive = [n for n in ray.nodes() if n["Alive"]]
    except (ray.exceptions.RayError, ConnectionError, TimeoutError) as error:
        raise StorageError(
            f"the Ray cluster is gone ({type(error).__name__}); "
            "the same command continues when it is there again"
        ) from None
    names = [
        n["NodeName"] if n["NodeName"] != n["NodeManagerAddress"] else n["NodeManagerHostname"]
        for n in alive
    ]
    counts = Counter(names)
    return {
        n["NodeID"]: Node(
            n["NodeID"],
            name if counts[name] == 1 else f"{name}/{n['NodeID'][:6]}",
            n["Resources"].get("CPU", 0.0),
            n["Resources"].get("GPU", 0.0),
        )
        for n, name in zip(alive, names, strict=True)
    }


def gpus_per_trial(engine: EngineSettings, there: Sequence[Node]) -> float:
    if engine.gpus_per_trial is not None:
        return engine.gpus_per_trial
    return 1.0 if engine.device not in ("cpu", "mps") and any(node.gpus for node in there) else 0.0


def check_capacity(engine: EngineSettings, there: Sequence[Node]) -> None:
    """Raise StorageError, naming the nodes, when none of them has room for one trial.

    A node without cores is a head: other nodes may still join, so it alone is no reason.
    """
    able = [node for node in there if node.cpus > 0]
    cpus, gpus = engine.cpus_per_trial, gpus_per_trial(engine, there)
    if not able or any(node.capacity(cpus, gpus) for node in able):
        return
    listed = ", ".join(f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in able)
    if gpus > 0 and not any(node.gpus for node in able):
        raise StorageError(
            f"engine.gpus_per_trial: {gpus:g}, but the cluster has no GPU ({listed})"
        )
    raise StorageError(
        f"engine.cpus_per_trial: {cpus}, but no node has so many beside its GPU ({listed})"
    )
