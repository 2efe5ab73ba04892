"""A trained model in Python: what `tuner.load` gives."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.core.types import Prediction
from tuner.errors import DataError, SpaceError
from tuner.preprocessing.example_files import walk_images
from tuner.training.exported_models import open_weights
from tuner.training.inference import BATCH_SIZE, Predictor, find_export, open_predictor

Example = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
"""A text; or an image: its path, a PIL image, an array (h, w, 3) of uint8, or a tensor (3, h, w),
uint8 or floating-point numbers in 0..1.
"""


class Model:
    """An exported model that predicts.

    `tuner.load` makes one. It is called with one example or several; `predict` goes through any
    number of them, a batch at a time.

    Args:
        predictor: The opened export.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._module: nn.Module | None = None

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r}, task={self.task!r}, classes={len(self.classes)})"

    @property
    def folder(self) -> Path:
        """The folder of the export."""
        return self._predictor.published.folder

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the export says of itself: run, scores, preprocessing, versions."""
        return self._predictor.published.manifest

    @property
    def task(self) -> str:
        return str(self.manifest["run"]["task"]["name"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, labels or targets, in the order of the model's outputs."""
        return tuple(self.manifest["classes"])

    @property
    def scores(self) -> Mapping[str, float]:
        """The scores on the test examples."""
        return self.manifest["scores"]["test"]  # type: ignore[no-any-return]

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is an iterable of strings too
        self, examples: Example, *, batch_size: int = BATCH_SIZE
    ) -> Prediction: ...

    @overload
    def __call__(
        self, examples: Iterable[Example], *, batch_size: int = BATCH_SIZE
    ) -> list[Prediction]: ...

    def __call__(
        self, examples: Example | Iterable[Example], *, batch_size: int = BATCH_SIZE
    ) -> Prediction | list[Prediction]:
        """The prediction for one example, or a list of them for several.

        Args:
            examples: An example, a sequence of them, a tensor (n, 3, h, w), or the path of a folder
                of images. A string is a text where the model takes texts, and a path otherwise.
            batch_size: How many are computed at a time.

        Returns:
            For each example what `tuner predict` says: `line` for a person, `values` for a program
            (`classes`, `labels`, `targets`, `objects`, `shares` or `continuation`), and for boxes
            and masks `picture`, a PNG.

        Raises:
            DataError: An image cannot be read.
            SpaceError: An example is of a kind that the model does not take.
        """
        if isinstance(examples, Tensor | np.ndarray) and examples.ndim == 4:
            return list(self.predict(list(examples), batch_size=batch_size))
        if _is_one(examples):
            if isinstance(examples, str | os.PathLike) and self._is_folder(examples):
                return list(self.predict(walk_images(Path(examples)), batch_size=batch_size))
            return next(self.predict([examples], batch_size=batch_size))  # type: ignore[list-item]
        return list(self.predict(examples, batch_size=batch_size))  # type: ignore[arg-type]

    def _is_folder(self, example: str | os.PathLike[str]) -> bool:
        return not self._predictor.takes_texts and os.path.isdir(example)

    def predict(
        self, examples: Iterable[Example], *, batch_size: int = BATCH_SIZE
    ) -> Iterator[Prediction]:
        """The predictions one after another; only `batch_size` examples are in memory at a time.

        Raises DataError, SpaceError.
        """
        prepare = self._to_text if self._predictor.takes_texts else self._to_image
        for named in self._predictor.predict_all(map(prepare, examples), batch_size):
            if isinstance(named, str):
                raise DataError(named)
            yield named.prediction

    def prepare(self, examples: Sequence[Example]) -> TensorTree:
        """The examples as `torch` takes them: float32 (n, 3, size, size) in 0..1; or token ids,
        int64 (n, length) by name.

        Raises DataError, SpaceError.
        """
        convert = self._to_text if self._predictor.takes_texts else self._to_image
        (batch,) = self._predictor.batches(map(convert, examples), len(examples))
        if batch.problems:
            raise DataError(*batch.problems)
        return batch.x

    @property
    def torch(self) -> nn.Module:
        """The model as a module of torch in eval mode, on the CPU: `model.torch(x)` for what
        `prepare` gives. The normalisation is inside.
        """
        if self._module is None:
            self._module = open_weights(self._predictor.published)
        return self._module

    @staticmethod
    def _to_text(example: Any) -> str:
        if not isinstance(example, str):
            raise SpaceError(f"expected a text (str), got {type(example).__name__}")
        return example

    @staticmethod
    def _to_image(example: Any) -> Path | NDArray[np.uint8] | Image.Image:
        if isinstance(example, str | os.PathLike):
            return Path(example)
        if isinstance(example, Image.Image):
            return example
        if isinstance(example, Tensor):
            return _tensor_pixels(example)
        if isinstance(example, np.ndarray) and example.dtype == np.uint8:
            return example
        raise SpaceError(
            f"expected an image (a path, a PIL image, an array (h, w, 3) of uint8, or a tensor "
            f"(3, h, w)), got {type(example).__name__}"
        )


def _is_one(examples: Any) -> bool:
    """Whether what was given is one example and not several."""
    return isinstance(examples, str | os.PathLike | Image.Image | Tensor | np.ndarray)


def _tensor_pixels(image: Tensor) -> NDArray[np.uint8]:
    """A tensor (3, h, w) as pixels, uint8 (h, w, 3). Raises SpaceError."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise SpaceError(f"expected a tensor (3, h, w) for an image, got {tuple(image.shape)}")
    if image.dtype != torch.uint8:
        low, high = float(image.min()), float(image.max())
        if not (image.is_floating_point() and low >= 0 and high <= 1):
            raise SpaceError(
                "a tensor is an image as uint8, or as floating-point numbers in 0..1 that are not "
                f"normalised; this one is {image.dtype} from {low:g} to {high:g}"
            )
        image = (image * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = image.cpu().permute(1, 2, 0).numpy()
    return pixels


def load(
    study: str | os.PathLike[str],
    *,
    format: str | None = None,
    device: str = "auto",
    flips: bool | None = None,
    trust: bool = False,
    studies: str | os.PathLike[str] = "studies",
) -> Model:
    """Loads the exported model of a study.

    Args:
        study: The folder of a study or of an export, or the name of a study in `studies`.
        format: The format to use; None: safetensors, which also computes on a GPU.
        device: `auto`, `cpu` or `cuda`.
        flips: Whether each image is averaged with its mirror image; None: as it was tested.
        trust: Whether code that the export names (a task or a model of someone's own) may be
            imported and run.
        studies: The folder of the studies.

    Raises:
        DataError: There is no export, or its files were changed.
        SpaceError: The format or the device is unknown, or the export names code that is not
            trusted.
        StorageError: There is no such device.
    """
    published = find_export(Path(studies), os.fspath(study))
    return Model(open_predictor(published, format, device, trust=trust, flips=flips))
