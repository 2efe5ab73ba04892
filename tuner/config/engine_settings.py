"""The section `engine`: where trials are carried out."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tuner.config.durations import parse_duration
from tuner.config.section import Section


def _check_gpus(value: int | list[int] | None) -> int | list[int] | None:
    if isinstance(value, int) and value < 1:
        raise ValueError(
            "write how many GPUs, at least 1, or their numbers, such as [0, 2]; for none, device: "
            "cpu"
        )
    if isinstance(value, list) and (not value or min(value) < 0 or len(set(value)) < len(value)):
        raise ValueError("write the GPUs' numbers, each once and from 0, such as [0, 2]")
    return value


ADDRESS_PATTERN = re.compile(r"auto|local|[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")


def _check_address(text: str) -> str:
    if "://" in text:
        raise ValueError(
            "Ray's client protocol hides which node fails, and its port runs anyone's code; start "
            "the command on a machine of the "
            "cluster and write auto, or HOST:PORT of its head"
        )
    if not ADDRESS_PATTERN.fullmatch(text):
        raise ValueError(
            "write auto, local, or HOST:PORT of the cluster's head, such as 10.0.0.1:6379"
        )
    return text


def _stall(text: str) -> str:
    if text not in ("auto", "never"):
        try:
            parse_duration(text)
        except ValueError as error:
            raise ValueError(f"{error}; or auto, or never") from None
    return text


class EngineSettings(Section):
    """Where trials are carried out."""

    name: str = Field("local", description="inline, local, ray")
    workers: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        "auto",
        description="auto: per_gpu for each GPU, or one on the CPU; "
        "ray: as many as the cluster has room for",
    )
    gpus: Annotated[int | list[int] | None, AfterValidator(_check_gpus)] = Field(
        None, description="how many of a machine's GPUs, or a list of their numbers; null: all"
    )
    per_gpu: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        1,
        description="workers that share a GPU, each with its part of the memory; auto: the first "
        "trial has it alone, and what it used says how many follow, at most 8",
    )
    address: Annotated[str, AfterValidator(_check_address)] = Field(
        "auto", description="ray: auto finds a running cluster; local; or HOST:PORT"
    )
    gpus_per_trial: float | None = Field(
        None,
        ge=0,
        le=64,
        description="local: how many GPUs train one model together, each a part of every batch, by "
        "torch's DistributedDataParallel; with device: cpu so many processes. ray: at most 1, "
        "or a fraction. null: 1 where there are GPUs",
    )
    cpus_per_trial: int = Field(1, ge=1, le=1024, description="ray: cores of a trial")
    stall: Annotated[str, AfterValidator(_stall)] = Field(
        "auto",
        description="a training that reports no epoch for so long is given up: 30m, 2h; never; "
        "auto: 10 times the longest epoch of its own, and an hour at least, after its first epoch",
    )
    ship: bool = Field(
        False, description="ray: send data and weights to nodes that do not have them"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="auto, cpu, cuda, cuda:N or mps",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of autocast; auto: bfloat16 on GPUs that have it, float16 with a scaled loss "
        "on older ones with tensor cores, float32 elsewhere",
    )
    compile: Literal["none", "suffix"] = Field(
        "none",
        description="suffix: torch.compile of the stages that are trained; takes minutes at first",
    )
    cache: Literal["auto", "always", "never"] = Field(
        "auto", description="remember what frozen stages compute"
    )
    cache_gb: float = Field(
        4.0, ge=0, le=100_000, description="disk for remembered activations, gigabytes"
    )

    @property
    def gpu_sharing(self) -> int:
        """How many workers share a GPU; with auto one, until the first trials are measured."""
        return 1 if self.per_gpu == "auto" else self.per_gpu

    @property
    def rank_count(self) -> int:
        """How many processes of this machine train one model together."""
        return max(1, int(self.gpus_per_trial or 1))
