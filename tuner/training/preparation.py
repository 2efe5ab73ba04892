"""Before the first epoch: builds what a run names, freezes its prefix and probes its head."""

from collections import deque
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.config.objective import Direction
from tuner.config.run import Recipe, Run
from tuner.core.device_transfers import send
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.subset import Subset
from tuner.core.types import Batch, Dataset, Source, StagedModel, Task
from tuner.errors import SpaceError
from tuner.training import activation_cache, linear_probe, pixel_probe
from tuner.training.activation_cache import CachedSource
from tuner.training.adapters import attach_adapters
from tuner.training.batch_norm import pretrained_norms
from tuner.training.building import (
    DeviceSource,
    build_task,
    copy_cached_model,
    load_dataset,
    put_on_device,
)
from tuner.training.class_balance import count_classes, read_labels
from tuner.training.data_parallel import ALONE
from tuner.training.devices import DeviceContext
from tuner.training.epoch import MAX_EVAL_BATCH, Diverged, TrainingContext
from tuner.training.frozen_prefix import MAX_EXAMPLES_AT_ONCE, FrozenPrefix
from tuner.training.memory_format import place_model
from tuner.training.own_metric import metric_key
from tuner.training.training_loop import fit

# of the linear probe: the loss, and, on features in memory, the training of the layers before the
# head's last one, where a head has some
PROBE_RECIPE = Recipe(
    optimizer="adamw", lr=1e-3, epochs=20, batch_size=64, schedule="cosine", head="fresh"
)


@dataclass(frozen=True)
class LoadedRun:
    """What a run names, loaded: its dataset, and its model with a digest for each stage."""

    run: Run
    dataset: Dataset
    staged_model: StagedModel
    stage_digests: tuple[str, ...]
    device_context: DeviceContext
    metric: str
    direction: Direction = "maximise"

    @property
    def train_source(self) -> Source:
        """The examples that the run is trained on."""
        is_full = self.run.recipe.fit == "train+valid"
        return self.dataset.full if is_full else self.dataset.train

    def behind_prefix(self, depth: int, source: Source) -> Source:
        """The outputs of the stages up to `depth` for a source of the dataset, on the device."""
        if depth == 0:
            return DeviceSource(
                source,
                self.dataset.input_spec,
                self.device_context,
                endless=self.dataset.views_are_for_cache,
                resident=True,
            )
        prefix, _ = self.staged_model.split(depth)
        frozen = FrozenPrefix(
            list(prefix.children()),
            self.stage_digests[:depth],
            self.device_context.device,
            self.device_context.autocast,
            max_batch=min(MAX_EXAMPLES_AT_ONCE, 4 * self.run.recipe.batch_size),
        )
        on_device = put_on_device(source, self.dataset.input_spec, self.device_context)
        return activation_cache.source_behind(frozen, on_device, self.device_context.cache_limits)

    def make_context(self, depth: int, recipe: Recipe) -> TrainingContext:
        """The context for a training of the stages behind `depth` by `recipe`."""
        _, suffix = self.staged_model.split(depth)
        return TrainingContext(
            task=self.task_of(recipe),
            staged_model=self.staged_model,
            net=suffix,
            pretrained_norms=pretrained_norms(suffix),
            dataset=self.dataset,
            train=self.behind_prefix(depth, self.train_source),
            valid=self.behind_prefix(depth, self.dataset.valid),
            test=self.behind_prefix(depth, self.dataset.test),
            device_context=self.device_context,
            metric=self.metric,
            direction=self.direction,
            labels=read_labels(self.train_source) if recipe.sampling == "balanced" else None,
        )

    def task_of(self, recipe: Recipe) -> Task:
        """The run's task with the loss of `recipe`.

        Classes are weighted by the examples that are trained on. Where an epoch has as many
        examples of each class, no weights are needed.
        """
        counts = None
        if recipe.class_weights != "none" and recipe.sampling == "natural":
            counts = count_classes(self.train_source, len(self.dataset.classes))
            counts = counts.to(self.device_context.device)
        run = replace(self.run, recipe=recipe)
        # those of `train` also where it learns from `full`, so that a soup has one scale
        return build_task(
            run, self.dataset.classes, counts, lambda: read_labels(self.dataset.train)
        )

    @property
    def probe_recipe(self) -> Recipe:
        """The recipe of the linear probe.

        Its loss weighs the classes as the run does, or as balanced sampling does on average, since
        training begins where the probe ends. Nothing else of the run's recipe changes the probe, so
        that trials share it.
        """
        recipe = self.run.recipe
        weights = "balanced" if recipe.sampling == "balanced" else recipe.class_weights
        return PROBE_RECIPE.model_copy(update={"class_weights": weights})


def prepare_training(
    run: Run, device_context: DeviceContext, metric: str, direction: Direction = "maximise"
) -> TrainingContext:
    """Builds the data and the model of a run and splits the model at the recipe's freeze depth.

    Args:
        run: The run to train.
        device_context: The device and its precision, and the home of the caches.
        metric: The name of the score that decides which epoch is the best.
        direction: Whether its higher or its lower values are better.

    Returns:
        What `fit` trains. Its head begins as the linear probe where the recipe says so.

    Raises:
        DataError: The data or the weights cannot be used.
        SpaceError: The run does not fit the model.
        Diverged: The linear probe diverged.
    """
    loaded = load_run(run, device_context, metric, direction)
    device_context, staged_model = loaded.device_context, loaded.staged_model
    depth = run.recipe.depth_of(staged_model.max_depth)
    if depth > staged_model.max_depth:
        raise SpaceError(
            f"recipe.freeze_depth: {depth}, but {run.model.name} allows 0..{staged_model.max_depth}"
        )
    if starts_from_probe(run, staged_model):
        probe_head(loaded)
    context = loaded.make_context(depth, run.recipe)
    adapters = run.recipe.adapters
    if adapters is not None:
        attach_adapters(
            staged_model, depth, adapters, run.model.name, lambda: run_one_example(context)
        )
    if device_context.compiles_suffix:
        context.net.compile()  # in place, so that its modules and names stay
    return context


def load_run(
    run: Run, device_context: DeviceContext, metric: str, direction: Direction = "maximise"
) -> LoadedRun:
    """Loads the data and the model of a run, and puts the model on the device.

    Raises DataError, SpaceError.
    """
    dataset = load_dataset(run, device_context.home)
    staged_model, digests = copy_cached_model(run, device_context, len(dataset.classes))
    if any(value.dtype == torch.bfloat16 for value in staged_model.model.parameters()):
        device_context = replace(device_context, precision="bfloat16")
    place_model(staged_model.model, device_context.device)
    return LoadedRun(run, dataset, staged_model, digests, device_context, metric, direction)


def run_one_example(context: TrainingContext) -> None:
    """Sends a training example through the net, in eval mode."""
    context.net.eval()
    with context.device_context.autocast():
        context.task.predict(context.net, context.train.take(torch.arange(1), 0).x)


def starts_from_probe(run: Run, staged_model: StagedModel) -> bool:
    """Whether the head begins as the linear probe.

    The features must be pretrained, and the head new: a head that the user has trained stays.
    """
    return (
        run.recipe.head == "probe"
        and staged_model.can_probe
        and staged_model.head_is_new
        and staged_model.max_depth > 0
        and run.model.options.get("weights") != "none"
    )


def probe_head(loaded: LoadedRun) -> None:
    """Gives the head its probed weights. Raises Diverged."""
    metric = metric_key(loaded.metric, loaded.direction)
    run_key = (
        f"{loaded.stage_digests[-2:]} {loaded.dataset.train.digest} {loaded.dataset.valid.digest} "
        f"{loaded.dataset.input_spec} {loaded.run.task.to_dict()} {metric} "
        f"{loaded.run.recipe.fit}"
    )
    if loaded.probe_recipe != PROBE_RECIPE:
        run_key += f" {loaded.probe_recipe.class_weights}"
    head = list(loaded.staged_model.stages.values())[-1]
    folder = loaded.device_context.home / "probes"
    linear_probe.load_or_solve_probe(head, folder, run_key, lambda: solve_head(loaded, head))


def solve_head(loaded: LoadedRun, head: nn.Module) -> None:
    """Solves the head's last layer, after its other layers were trained where it has some.

    Of a segmenter the convolutions that it names are solved. A head that does not end with a linear
    layer stays as it is. Raises Diverged.
    """
    depth = loaded.staged_model.max_depth
    train, valid = (
        loaded.behind_prefix(depth, source)
        for source in (loaded.dataset.train, loaded.dataset.valid)
    )
    loaded.staged_model.split(depth)  # the head is trained, and only the head
    if loaded.staged_model.pixel_classifiers:
        solve_pixel_classifiers(loaded, head, train, valid)
        return
    context = loaded.device_context
    some_features = train.take(torch.arange(min(2, len(train))), 0).x
    layer = linear_probe.find_output_layer(head, some_features, context.autocast)
    if layer is None:
        return
    if linear_probe.has_hidden_layers(head, layer):
        train_hidden_layers(loaded, train, valid)
    train_examples, valid_examples = (
        linear_probe.collect_layer_examples(head, layer, source, MAX_EVAL_BATCH, context.autocast)
        for source in (train, valid)
    )
    linear_probe.solve_output_layer(
        layer,
        loaded.task_of(loaded.probe_recipe).loss,
        train_examples,
        valid_examples,
        join_valid=loaded.run.recipe.fit == "train+valid",
    )
    check_finite(layer)


def solve_pixel_classifiers(
    loaded: LoadedRun, head: nn.Module, train: Source, valid: Source
) -> None:
    """Solves a segmenter's new convolutions on features of pixels. Raises Diverged."""
    groups = loaded.staged_model.pixel_classifiers
    examples = [
        pixel_probe.collect_pixel_examples(head, groups, source, loaded.device_context.autocast)
        for source in (train, valid)
    ]
    for group, train_examples, valid_examples in zip(groups, *examples, strict=True):
        pixel_probe.solve_convolutions(
            group,
            loaded.task_of(loaded.probe_recipe).loss,
            train_examples,
            valid_examples,
            join_valid=loaded.run.recipe.fit == "train+valid",
        )
        for layer in group:
            check_finite(layer)


def check_finite(layer: nn.Module) -> None:
    """Raises Diverged where a weight of a solved layer is not a number."""
    if not all(bool(torch.isfinite(value).all()) for value in layer.parameters()):
        raise Diverged("the linear probe is not finite")


def train_hidden_layers(loaded: LoadedRun, train: Source, valid: Source) -> None:
    """Trains the whole head on features in memory. Raises Diverged."""
    context = loaded.make_context(loaded.staged_model.max_depth, loaded.probe_recipe)
    in_memory = replace(
        context,
        train=MemorySource.of(train),
        valid=MemorySource.of(valid),
        device_context=replace(context.device_context, ranks=ALONE),  # each rank its own, alike
    )
    deque(fit(in_memory, loaded.probe_recipe, seed=0), maxlen=0)


@dataclass(frozen=True)
class MemorySource:
    """The first view of a source in memory."""

    x: TensorTree
    y: TensorTree
    digest: str
    views: int = 1
    lengths: Tensor | None = None

    @staticmethod
    def of(source: Source) -> "MemorySource":
        """Reads the whole source."""
        chunks = [
            source.take(index, 0)
            for index in torch.split(torch.arange(len(source)), MAX_EVAL_BATCH)
        ]
        return MemorySource.join([x for x, _ in chunks], [y for _, y in chunks], source.digest)

    @staticmethod
    def join(inputs: list[TensorTree], targets: list[TensorTree], digest: str) -> "MemorySource":
        """A source of the examples of some batches."""
        return MemorySource(_join(inputs), _join(targets), digest)

    def __len__(self) -> int:
        return len(next(iter(tree_to_dict(self.y).values())))

    def take(self, index: Tensor, view: int) -> Batch:
        return Batch(_select(self.x, index), _select(self.y, index))

    def is_resident(self, view: int) -> bool:
        return True


def _join(trees: list[TensorTree]) -> TensorTree:
    if isinstance(trees[0], Tensor):
        return torch.cat([tree for tree in trees if isinstance(tree, Tensor)])
    return {name: _join_padded([tree_to_dict(tree)[name] for tree in trees]) for name in trees[0]}


def _join_padded(parts: list[Tensor]) -> Tensor:
    """The rows of all parts. Batches of texts are as wide as their longest text; narrower ones are
    padded with zeros, as their masks are.
    """
    if len({part.shape[1:] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [
            F.pad(part, (*(0, 0) * (part.dim() - 2), 0, width - part.shape[1])) for part in parts
        ]
    return torch.cat(parts)


def _select(tree: TensorTree, index: Tensor) -> TensorTree:
    if isinstance(tree, Tensor):
        return tree[send(index, tree.device)]
    return {name: tensor[send(index, tensor.device)] for name, tensor in tree.items()}


def few_examples(source: Source, count: int) -> Source:
    """Some examples of a source; those of a cache are computed, and stay in memory."""
    rows = torch.arange(min(count, len(source)))
    if not isinstance(source, CachedSource):
        return Subset(source, rows, f"{source.digest} {count}")
    if source.rows is not None:
        rows = source.rows[rows]
    return MemorySource.of(Subset(source.uncached, rows, f"{source.digest} {count}"))
