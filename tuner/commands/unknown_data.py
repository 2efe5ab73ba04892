"""What to do with data that cannot be read in any way."""

from pathlib import Path

from tuner.errors import count_words, limit_listing
from tuner.preprocessing.image_decoding import SUFFIXES


def explain_unreadable(given: str) -> str:
    """What to do with a folder or file that cannot be read as data."""
    path = Path(given).expanduser()
    seen = []
    if path.is_dir():
        if hint := _explain_classes(path, given):
            return hint
        names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in path.iterdir())
        seen = limit_listing(names, 6)
    inside = f" (it holds {', '.join(seen) if seen else 'nothing'})" if path.is_dir() else ""
    return (
        f"{given}: not known as data{inside}; expected folders of images by class, VOC, COCO or "
        "YOLO annotations, images/ and masks/, or a csv, tsv, JSON lines or Parquet "
        "file of images or texts, or a CoNLL file of tagged words; "
        "`tuner init` lists examples"
    )


def _explain_classes(root: Path, given: str) -> str:
    """Why images are not classes in folders; empty where there are none."""
    loose = sum(map(is_image, root.iterdir()))
    if loose:
        return (
            f"{given}: {count_words(loose, 'image lies', 'images lie')} directly in it; put each "
            f"class's images into a folder of its own ({given}/cats/…, {given}/dogs/…), or write a "
            "table of images and labels"
        )
    folders = (f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith("."))
    holding = [f.name for f in folders if any(map(is_image, f.rglob("*")))]
    if len(holding) == 1:
        return (
            f"{given}: all images are in {holding[0]!r}; to tell classes apart there must be a "
            "folder for each of at least two"
        )
    return ""


def is_image(path: Path) -> bool:
    """Whether a name is that of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()
