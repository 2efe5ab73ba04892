"""Hyperparameter search for fine-tuning pretrained models.

YAML and labelled data in, a verified model out. In Python (docs/python.md):

    import tuner

    study = tuner.run("photos", time="1h")
    model = tuner.load("studies/photos")
    model("new.jpg").line
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.core.types import Prediction
    from tuner.errors import TunerError
    from tuner.study import Study, Trial, run
    from tuner.training.loaded_model import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "Prediction", "Study", "Trial", "TunerError", "__version__", "load", "run"]

# where each name is; it is imported when it is first asked for, since torch takes seconds
_MODULES = {
    "Model": "tuner.training.loaded_model",
    "Prediction": "tuner.core.types",
    "Study": "tuner.study",
    "Trial": "tuner.study",
    "TunerError": "tuner.errors",
    "load": "tuner.training.loaded_model",
    "run": "tuner.study",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
