"""Carry what `tuner` needs to a machine that has a GPU, torch and torchvision, but no network.

    python scripts/gpu_wheels.py fetch            # here: wheels for Python 3.12 into build/gpu-wheels
    python scripts/gpu_wheels.py install TARGET   # there: into the folder TARGET, only what is missing
    PYTHONPATH=TARGET:. python benchmarks/gpu.py

The wheels are for Linux on x86-64, in the versions of constraints.txt. Whatever the machine has
already stays as it is, in any version: torch was built against its own numpy. ONNX with its runtime
and SciPy are not among the wheels because of their size. Where they are missing, what needs them
(exports to ONNX, RT-DETR's loss) is left out by the kit and its tests.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "gpu-wheels"
PYTHON = "3.12"
MAX_MEGABYTES = 60  # what can be carried is 64 MiB, and the repository comes along
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (5, 12, 17, 24, 27, 28)))
PACKAGES = {
    "tuner itself": "pydantic pydantic_core annotated-types typing-inspection PyYAML typer rich click "
    "shellingham annotated-doc markdown-it-py mdurl Pygments torchmetrics lightning-utilities "
    "packaging safetensors faster-coco-eval pycocotools",
    "the search": "optuna alembic SQLAlchemy Mako colorlog tqdm",
    "plots": "matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil tzdata",
    "timm and U-Net": "timm segmentation_models_pytorch",
    "BERT and RT-DETR": "transformers tokenizers huggingface_hub hf-xet regex httpx2 httpcore2 h11 "
    "anyio idna truststore certifi",
    "the tests": "pytest pluggy iniconfig pytest-timeout",
}
# what comes with torch 2.11 and torchvision 0.26, by what their wheels require
PROVIDED = (
    "torch torchvision numpy pillow typing_extensions filelock fsspec Jinja2 MarkupSafe networkx sympy "
    "mpmath setuptools"
)


def names() -> list[str]:
    """The packages to carry."""
    return [name for line in PACKAGES.values() for name in line.split()]


def fetch(folder: Path) -> None:
    """Download the wheels. Exits where they are too large to be carried."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += ["--constraint", ROOT / "constraints.txt", *names()]
    subprocess.run([str(word) for word in command], check=True)
    wheels = list(folder.glob("*.whl"))
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{folder}: {len(wheels)} wheels, {megabytes:.1f} MB")
    if megabytes > MAX_MEGABYTES:
        raise SystemExit(f"more than {MAX_MEGABYTES} MB; leave out a package of PACKAGES")


def missing_wheels(wheels: Sequence[Path]) -> list[Path]:
    """Those whose package this Python does not have, in any version."""
    return [wheel for wheel in wheels if not is_installed(wheel.name.partition("-")[0])]


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(folder: Path, target: Path) -> None:
    """Install the missing packages into `target`. Exits where there are no wheels."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder} has no wheels; run first, with network: {sys.argv[0]} fetch")
    missing = missing_wheels(wheels)
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--target", target, *missing]
        subprocess.run([str(word) for word in command], check=True)
    print(f"{target}: {len(missing)} packages installed, {len(wheels) - len(missing)} were there")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("fetch", "install"))
    parser.add_argument("target", type=Path, nargs="?", help="the folder for the packages")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the folder of the wheels")
    args = parser.parse_args()
    if args.verb == "fetch":
        fetch(args.folder)
        return
    if args.target is None:
        parser.error("install: name the folder for the packages")
    install(args.folder, args.target)


if __name__ == "__main__":
    main()
