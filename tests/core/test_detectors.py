"""Objects as they travel with a batch: padded, and unpadded again for the losses."""

import torch

from tests.helpers.device_waits import WaitingOperators
from tuner.core.detectors import unpad_targets
from tuner.core.targets import NO_OBJECT, ignored_label


def test_objects_of_many_images_are_unpadded_with_the_waits_of_one() -> None:
    labels = torch.tensor([[2, NO_OBJECT, 0], [NO_OBJECT] * 3, [ignored_label(1), 1, NO_OBJECT]])
    boxes = torch.arange(36.0).view(3, 3, 4)
    layers = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 1, 3, 1).expand(3, 1, 3, 3)
    targets = {"target.boxes": boxes, "target.labels": labels, "target.layers": layers}
    waits = []
    for count in (1, 3):
        with WaitingOperators() as operators:
            operators.watching = True
            images = unpad_targets({name: value[:count] for name, value in targets.items()})
        waits.append(operators.names)
    assert waits[0] == waits[1]
    for image, rows, image_boxes, image_labels in zip(
        images, ([0, 2], [], [1]), boxes, labels, strict=True
    ):
        assert torch.equal(image["boxes"], image_boxes[rows])
        assert torch.equal(image["labels"], image_labels[rows])
        lines = [mask[:, 0].nonzero()[:, 0].tolist() for mask in image["masks"]]
        assert lines == [[row] for row in rows]
