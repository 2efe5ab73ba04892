"""Names the code that computes a stage: equal weights under other code may give other outputs."""

import functools
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

OWN_PACKAGE = __name__.partition(".")[0]


def code_digest(module: nn.Module) -> str:
    """SHA-256 over the code of all classes in a module's tree, and over the version of torch.

    A class of an installed package stands for that package's version. Any other class, such as one
    of tuner or of a user's own file, stands for the file that defines it: a function beside the
    class may do part of its work.
    """
    classes = {cls for part in module.modules() for cls in type(part).__mro__}
    codes = {name_code(cls) for cls in classes}
    content = "\n".join([f"torch {torch.__version__}", *sorted(codes)])
    return hashlib.sha256(content.encode()).hexdigest()


@functools.cache
def name_code(cls: type) -> str:
    """The package of a class with its version, or the SHA-256 of the class's source."""
    package = cls.__module__.partition(".")[0]
    if package in sys.stdlib_module_names and package != "__main__":
        return ""
    version = _installed_version(package) if package != OWN_PACKAGE else None
    return f"{package} {version}" if version else f"{cls.__qualname__} {_source_digest(cls)}"


def _installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is read from elsewhere.

    A package that is installed in editable mode is read from elsewhere: its files change while its
    version stays.
    """
    module = sys.modules.get(package)
    return _version_of(module, package) if module is not None else None


@functools.cache
def _version_of(module: ModuleType, package: str) -> str | None:
    """As above, once for a module that was imported: reading metadata takes milliseconds."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    root = Path(file).parent.parent if Path(file).stem == "__init__" else Path(file).parent
    if next(root.glob("*.dist-info"), None) is None:  # these lie beside what was installed
        return None
    versions = [
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in _distributions_of(package)
        if Path(str(distribution.locate_file(""))).resolve() == root.resolve()
    ]
    return " ".join(versions) or None


def _distributions_of(package: str) -> list[importlib.metadata.Distribution]:
    """The installed distributions that may have brought a package."""
    try:
        return [importlib.metadata.distribution(package)]  # most have the name of their package
    except importlib.metadata.PackageNotFoundError:
        names = _distribution_names().get(package, [])
        return [importlib.metadata.distribution(name) for name in sorted(set(names))]


@functools.cache
def _distribution_names() -> Mapping[str, list[str]]:
    """The names of the distributions by package. It reads the files of all: a third of a second."""
    return importlib.metadata.packages_distributions()


def _source_digest(cls: type) -> str:
    """SHA-256 of the file that defines a class, or of its source where there is no file, as in a
    notebook.
    """
    module: ModuleType | None = sys.modules.get(cls.__module__)
    try:
        content = Path(str(getattr(module, "__file__", None))).read_bytes()
    except OSError:
        try:
            content = inspect.getsource(cls).encode()
        except (OSError, TypeError):  # typed into a prompt, or made by a program
            content = b""
    return hashlib.sha256(content).hexdigest()
