"""Everything that a plug-in of your own imports from tuner: `from tuner.api import Task, Batch, …`.

A plug-in is named in a space file as `package.module:attribute`. `tuner/config/plugins.py` says how
each kind is called, `examples/plugins/` has one tested example of each kind, and CONTRIBUTING.md
walks through one of them.

What is stable: the names in `__all__`, their fields, and the arguments of their functions and
methods. Before version 1.0 they change only in a minor version, and CHANGELOG.md says how. Every
other module of tuner may change in any version, so a plug-in should import from this module alone.

A name is imported when it is first asked for. So an engine, which needs no tensors, can be written
with this module and does not load torch into the process that owns the study.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.config.data_options import ImageOptions, SplitOptions
    from tuner.config.run import EngineSettings, Recipe
    from tuner.core.detectors import (
        IMAGE_NAME,
        DetectorHead,
        DetectorStage,
        Objects,
        join_targets,
        pad_objects,
        unpad_objects,
    )
    from tuner.core.export_module import ExportModule
    from tuner.core.input_spec import (
        IMAGENET_SPEC,
        ImageInputSpec,
        InputSpec,
        TensorTree,
        TextInputSpec,
        relative_difference,
        tree_to_dict,
    )
    from tuner.core.targets import IGNORED, NO_OBJECT, Boxes, Labels, Masks, Targets
    from tuner.core.types import (
        Batch,
        Dataset,
        Prediction,
        Source,
        StagedModel,
        Task,
        split_sequential,
    )
    from tuner.core.weights import load_matching_state, read_state_dict
    from tuner.engines._job_runner import run_job
    from tuner.errors import (
        DataError,
        SpaceError,
        StorageError,
        TunerError,
        nearest_hint,
        suggest_names,
    )
    from tuner.jobs import (
        Job,
        LossCause,
        NextJob,
        OnEnd,
        OnReport,
        Outcome,
        RunJobs,
        ShouldContinue,
        Stall,
    )
    from tuner.messages import Epoch
    from tuner.preprocessing.detection_dataset import AnnotatedImage, detection_dataset
    from tuner.preprocessing.image_dataset import (
        MakeTargets,
        assemble_dataset,
        classification_dataset,
        content_digest,
    )
    from tuner.preprocessing.image_store import ImageStore
    from tuner.preprocessing.segmentation_dataset import MaskLegend, segmentation_dataset
    from tuner.preprocessing.splits import (
        TEST,
        TRAIN,
        UNSPLIT,
        VALID,
        Items,
        assign_and_limit_splits,
        check_classes,
    )
    from tuner.preprocessing.tokenization import (
        TextSource,
        decode_texts,
        load_tokenizer,
        open_token_store,
        trim_padding,
    )
    from tuner.trackers._tracked import RunEnd, TrackedRun, TrackedStudy, Tracker

__all__ = [
    "IGNORED",
    "IMAGENET_SPEC",
    "IMAGE_NAME",
    "NO_OBJECT",
    "TEST",
    "TRAIN",
    "UNSPLIT",
    "VALID",
    "AnnotatedImage",
    "Batch",
    "Boxes",
    "DataError",
    "Dataset",
    "DetectorHead",
    "DetectorStage",
    "EngineSettings",
    "Epoch",
    "ExportModule",
    "ImageInputSpec",
    "ImageOptions",
    "ImageStore",
    "InputSpec",
    "Items",
    "Job",
    "Labels",
    "LossCause",
    "MakeTargets",
    "MaskLegend",
    "Masks",
    "NextJob",
    "Objects",
    "OnEnd",
    "OnReport",
    "Outcome",
    "Prediction",
    "Recipe",
    "RunEnd",
    "RunJobs",
    "ShouldContinue",
    "Source",
    "SpaceError",
    "SplitOptions",
    "StagedModel",
    "Stall",
    "StorageError",
    "Targets",
    "Task",
    "TensorTree",
    "TextInputSpec",
    "TextSource",
    "TrackedRun",
    "TrackedStudy",
    "Tracker",
    "TunerError",
    "assemble_dataset",
    "assign_and_limit_splits",
    "check_classes",
    "classification_dataset",
    "content_digest",
    "decode_texts",
    "detection_dataset",
    "join_targets",
    "load_matching_state",
    "load_tokenizer",
    "nearest_hint",
    "open_token_store",
    "pad_objects",
    "read_state_dict",
    "relative_difference",
    "run_job",
    "segmentation_dataset",
    "split_sequential",
    "suggest_names",
    "tree_to_dict",
    "trim_padding",
    "unpad_objects",
]

_NAMES_BY_MODULE = {
    "tuner.config.data_options": ("ImageOptions", "SplitOptions"),
    "tuner.config.run": ("EngineSettings", "Recipe"),
    "tuner.core.detectors": (
        "IMAGE_NAME",
        "DetectorHead",
        "DetectorStage",
        "Objects",
        "join_targets",
        "pad_objects",
        "unpad_objects",
    ),
    "tuner.core.export_module": ("ExportModule",),
    "tuner.core.input_spec": (
        "IMAGENET_SPEC",
        "ImageInputSpec",
        "InputSpec",
        "TensorTree",
        "TextInputSpec",
        "relative_difference",
        "tree_to_dict",
    ),
    "tuner.core.targets": ("IGNORED", "NO_OBJECT", "Boxes", "Labels", "Masks", "Targets"),
    "tuner.core.types": (
        "Batch",
        "Dataset",
        "Prediction",
        "Source",
        "StagedModel",
        "Task",
        "split_sequential",
    ),
    "tuner.core.weights": ("load_matching_state", "read_state_dict"),
    "tuner.engines._job_runner": ("run_job",),
    "tuner.errors": (
        "DataError",
        "SpaceError",
        "StorageError",
        "TunerError",
        "nearest_hint",
        "suggest_names",
    ),
    "tuner.jobs": (
        "Job",
        "LossCause",
        "NextJob",
        "OnEnd",
        "OnReport",
        "Outcome",
        "RunJobs",
        "ShouldContinue",
        "Stall",
    ),
    "tuner.messages": ("Epoch",),
    "tuner.preprocessing.detection_dataset": ("AnnotatedImage", "detection_dataset"),
    "tuner.preprocessing.image_dataset": (
        "MakeTargets",
        "assemble_dataset",
        "classification_dataset",
        "content_digest",
    ),
    "tuner.preprocessing.image_store": ("ImageStore",),
    "tuner.preprocessing.segmentation_dataset": ("MaskLegend", "segmentation_dataset"),
    "tuner.preprocessing.splits": (
        "TEST",
        "TRAIN",
        "UNSPLIT",
        "VALID",
        "Items",
        "assign_and_limit_splits",
        "check_classes",
    ),
    "tuner.preprocessing.tokenization": (
        "TextSource",
        "decode_texts",
        "load_tokenizer",
        "open_token_store",
        "trim_padding",
    ),
    "tuner.trackers._tracked": ("RunEnd", "TrackedRun", "TrackedStudy", "Tracker"),
}
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """The object behind a name of `__all__`, imported at the first use of the name."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
