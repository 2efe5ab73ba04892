"""The units of a model between which it can be cut, found in the structure of its modules.

The trunk of a model is what holds most of its weights: numbered children (layer1, layer2, ...), or
a container (nn.Sequential, nn.ModuleList), or one module that has such a container inside. Its
children are the units. What comes before is the stem, what comes last is the head.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

CONTAINER_SHARE = 0.3  # of the weights, from which a container is the trunk
STEM_SHARE = 0.15  # of the weights in containers, below which a container is no unit of the trunk
MANY_UNITS = 4  # children with weights, from which it is so too, as in VGG
DOMINANT = 0.8  # share of the weights that makes a module the trunk although it is no container
NUMBERED = re.compile(r"^(.*?)[_-]?\d+$")


@dataclass(frozen=True)
class ModelUnits:
    """Paths of modules, as `named_modules` writes them.

    Args:
        paths: The units, in the order of their definition. No unit lies inside another one.
        trunk: Those of `paths` that belong to the trunk.
        heads: Those of `paths` that are classifiers; models that were distilled have two.
    """

    paths: tuple[str, ...]
    trunk: frozenset[str]
    heads: tuple[str, ...]

    def holders(self) -> frozenset[str]:
        """The paths of all modules around the units; '' is the model itself."""
        found = {""}
        for path in self.paths:
            names = path.split(".")
            found |= {".".join(names[:end]) for end in range(1, len(names))}
        return frozenset(found)

    def unit_of(self, path: str) -> str | None:
        """The unit in which the module or parameter at `path` lies."""
        return next((p for p in self.paths if path == p or path.startswith(f"{p}.")), None)


def find_units(model: nn.Module, heads: Collection[str] = ()) -> ModelUnits:
    """The units of a model.

    Args:
        model: The model.
        heads: The paths of its classifiers. Where there are none, the last linear layer or
            convolution in the order of definition is the classifier.
    """
    known = [path for path in heads if _is_inside(model, path)]
    if not known:
        known = [name for name, module in model.named_modules() if _is_layer(module)][-1:]
    trunk_path, trunk_children = _find_trunk(model, "", known)
    trunk = [_join(trunk_path, name) for name in trunk_children]
    opened = {*trunk, *known}
    paths = tuple(_list_units(model, "", opened))
    return ModelUnits(paths, frozenset(path for path in trunk if path in paths), tuple(known))


def _is_inside(model: nn.Module, path: str) -> bool:
    return any(name == path and weight_count(m) for name, m in model.named_modules())


def _is_layer(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return any(value.dim() > 1 for value in own) and not list(module.children())


def weight_count(module: nn.Module) -> int:
    """The number of a module's weights in matrices and kernels; vectors, such as those of norms, do
    not count.
    """
    return sum(value.numel() for value in module.parameters() if value.dim() > 1)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _holds(path: str, others: Collection[str]) -> bool:
    """Whether one of `others` is at `path` or inside it."""
    return any(other == path or other.startswith(f"{path}.") for other in others)


def _find_trunk(module: nn.Module, path: str, heads: list[str]) -> tuple[str, list[str]]:
    """The path of the module whose children are the trunk, and the names of these children.

    A name of a child's child goes with a dot.
    """
    children = {
        name: child
        for name, child in module.named_children()
        if weight_count(child) and not _holds(_join(path, name), heads)
    }
    sizes = {name: weight_count(child) for name, child in children.items()}
    numbered = _largest_numbered(sizes)
    containers = {name: child for name, child in children.items() if _is_container(child)}
    largest = max(containers, key=lambda name: sizes[name], default=None)
    if isinstance(module, nn.Sequential | nn.ModuleList) and path:
        return path, list(children)
    if numbered and (largest is None or sum(sizes[n] for n in numbered) >= sizes[largest]):
        return path, numbered
    if largest is not None and (
        sizes[largest] >= CONTAINER_SHARE * sum(sizes.values())
        or _weighty_children(containers[largest]) >= MANY_UNITS
        or _has_equal_blocks(containers[largest])
    ):
        return path, [
            f"{name}.{child}"
            for name in containers
            if sizes[name] >= STEM_SHARE * sum(sizes[each] for each in containers)
            or isinstance(containers[name], nn.ModuleList)
            for child, inner in containers[name].named_children()
            if weight_count(inner)
        ]
    dominant = max(sizes, key=lambda name: sizes[name], default=None)
    if dominant is not None and sizes[dominant] >= DOMINANT * sum(sizes.values()):
        return _find_trunk(children[dominant], _join(path, dominant), heads)
    return path, list(children)


def _is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, and at least two of them have weights."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and _weighty_children(module) > 1


def _weighty_children(module: nn.Module) -> int:
    return sum(1 for child in module.children() if weight_count(child))


def _has_equal_blocks(module: nn.Module) -> bool:
    """Whether all children with weights are of one class, and have modules inside."""
    weighty = [child for child in module.children() if weight_count(child)]
    return len({type(child) for child in weighty}) == 1 and all(
        next(child.children(), None) is not None for child in weighty
    )


def _largest_numbered(sizes: dict[str, int]) -> list[str]:
    """Of the names that differ in their number alone those with the most weights; [] where there
    are no two.
    """
    groups: dict[str, list[str]] = {}
    for name in sizes:
        match = NUMBERED.match(name)
        if match and match[1]:
            groups.setdefault(match[1], []).append(name)
    several = [names for names in groups.values() if len(names) > 1]
    return max(several, key=lambda names: sum(sizes[n] for n in names), default=[])


def _list_units(module: nn.Module, path: str, opened: Collection[str]) -> Iterator[str]:
    """The modules to call as a whole: everything that has none of `opened` inside."""
    for name, child in module.named_children():
        own = _join(path, name)
        if own not in opened and _holds(own, opened):
            yield from _list_units(child, own, opened)
        elif next(child.parameters(), None) is not None or own in opened:
            yield own
