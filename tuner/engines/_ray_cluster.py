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

PING = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).check_alive([], timeout=5)"
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
        found = math.floor(self.cpus / cpus)
        if gpus > 0:
            found = min(found, math.floor(self.gpus) * math.floor(1 / gpus + 1e-9))
        return found


@contextlib.contextmanager
def connect_ray(engine: EngineSettings, warn: Callable[[str], None]) -> Iterator[Any]:
    """The module `ray`, connected to the cluster for the length of the block. Raises StorageError."""
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
    """Ray, told before it is loaded to report nothing home, and to stay on loopback where nobody else shall join."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if local:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # whatever the system: 127.0.0.1
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(
                32
            )  # for this command only; other users of the machine do not know it
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # the default to come; unset, it warns
    try:
        import ray
    except ImportError:
        raise StorageError(
            f"engine.name: ray needs the package ray: {pip_install('ray')}"
        ) from None
    core: Any = ray._raylet
    core.Config.initialize(
        ""
    )  # as Ray's own start does: where it was loaded before, it has read the environment already
    core.AuthenticationTokenLoader.instance().reset_cache()
    return ray


@contextlib.contextmanager
def silence_ray(ray: Any) -> Iterator[None]:
    """Keeps what Ray would print about dead workers and nodes off stdout: the engine says it in its own words."""
    worker = ray._private.worker
    before, worker.print_to_stdstream = (
        worker.print_to_stdstream,
        lambda *_, **__: None,
    )  # no setting of Ray's reaches it
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextlib.contextmanager
def preserve_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts."""
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
        said = " ".join(str(error).split())
        if "ersion mismatch" in said:
            raise StorageError(
                f"engine.address: {address}: {said}; install the same versions of Ray and Python on every machine"
            ) from None
        raise StorageError(f"engine.address: {address}: {said}") from None


def job_config(ray: Any) -> Any:
    """Keeps Ray from putting the current folder, where anything may lie, first on its workers' path.

    A slot gets this process's path instead, after its own.
    """
    config = ray.job_config.JobConfig()
    config._runtime_env_has_working_dir = lambda: True  # no public setting does it
    return config


def disconnect(ray: Any) -> None:
    """Disconnects, and sees a cluster that was started here to its end: no process of it is left."""
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
    """HOST:PORT of a cluster that answers and lets this machine in."""
    address = address_setting
    if address_setting == "auto":
        named = os.environ.get("RAY_ADDRESS", "auto")
        if "://" in named:
            raise StorageError(
                f"engine.address: auto, but RAY_ADDRESS is {named}; write HOST:PORT of the cluster's head"
            )
        try:
            address = str(ray._private.services.canonicalize_bootstrap_address_or_die(named))
        except (ConnectionError, ValueError):
            raise StorageError(
                "engine.address: auto, but no Ray cluster runs on this machine; start one with `ray start --head`, write HOST:PORT of "
                "a cluster's head, or local"
            ) from None
    said = ping(address, ray_environment(os.environ))
    if said is None:
        raise StorageError(
            f"engine.address: no Ray cluster answers at {address} within {PING_SECONDS:.0f} s; is it HOST:PORT of the head (`ray start --head "
            "--port=6379`), running, and not behind a firewall?"
        )
    if said == "AuthenticationError":
        raise StorageError(
            f"engine.address: the Ray cluster at {address} does not take this machine's token; {TOKEN_HINT} as on its nodes"
        )
    return address


def require_authentication(address: str, warn: Callable[[str], None]) -> None:
    """What is done about a cluster that asks nobody for a token: whoever reaches it can run code on every node.

    Raises StorageError where other machines reach it, and warns of the other users of this machine.
    """
    anonymous = (
        ray_environment(os.environ)["RAY_AUTH_MODE"] == "disabled"
    )  # then it has just let us in
    if not anonymous and ping(address, {**os.environ, "RAY_AUTH_MODE": "disabled"}) != "":
        return
    remedy = f"{TOKEN_HINT} on every node before `ray start`, and here"
    if is_loopback(address):
        warn(
            f"engine.address: the Ray cluster at {address} asks nobody for a token, so every user of "
            f"this machine can run code on it as you; {remedy}"
        )
        return
    raise StorageError(
        f"engine.address: the Ray cluster at {address} can be reached from other machines and asks nobody for a token, so anyone can run "
        f"code on it; {remedy}"
    )


def ray_environment(environment: Any) -> dict[str, str]:
    """The environment as Ray's own programs see it: a token that is there is used."""
    file = Path.home() / ".ray" / "auth_token"
    has = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys() or file.is_file()
    return {"RAY_AUTH_MODE": "token" if has else "disabled", **environment}


def ping(address: str, environment: dict[str, str]) -> str | None:
    """Asks a cluster, from a process of its own, whether it is alive: empty when it is, the error's name, None when nobody answers."""
    command = [sys.executable, "-P", "-c", PING, address]
    try:
        found = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PING_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if found.returncode == 0:
        return ""
    return (
        "AuthenticationError"
        if "AuthenticationError" in found.stderr or "Unauthenticated" in found.stderr
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
        found = [n for n in ray.nodes() if n["Alive"]]
    except (ray.exceptions.RayError, ConnectionError, TimeoutError) as error:
        raise StorageError(
            f"the Ray cluster is gone ({type(error).__name__}); the same command continues when it is there again"
        ) from None
    names = [
        n["NodeName"] if n["NodeName"] != n["NodeManagerAddress"] else n["NodeManagerHostname"]
        for n in found
    ]
    often = Counter(names)
    return {
        n["NodeID"]: Node(
            n["NodeID"],
            name if often[name] == 1 else f"{name}/{n['NodeID'][:6]}",
            n["Resources"].get("CPU", 0.0),
            n["Resources"].get("GPU", 0.0),
        )
        for n, name in zip(found, names, strict=True)
    }


def gpus_per_trial(engine: EngineSettings, there: Sequence[Node]) -> float:
    if engine.gpus_per_trial is not None:
        return engine.gpus_per_trial
    return 1.0 if engine.device not in ("cpu", "mps") and any(node.gpus for node in there) else 0.0


def check_capacity(engine: EngineSettings, there: Sequence[Node]) -> None:
    """Raises StorageError, naming the nodes, when they have no room for even one trial. Nodes without cores are heads: more may come."""
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
