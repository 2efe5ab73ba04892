"""The benchmarks' data set: a few hundred images of an ImageFolder, balanced over the classes, in train, valid and test.

    tar xzf cifar10.tar.gz -C DATA
    python benchmarks/photographs.py DATA/cifar10 OUT [--train 800] [--valid 400] [--test 400] [--seed 0]

SOURCE holds train/ and test/ (or only classes, and all parts are drawn from them); OUT gets {train,valid,test}/<class> with
symbolic links, or copies with --copy. Validation images come from SOURCE's train, test images from its test.
"""

import argparse
import random
import shutil
from pathlib import Path

SUFFIXES = {".jpg", ".jpeg", ".png"}


def images(folder: Path, rng: random.Random) -> dict[str, list[Path]]:
    """Class -> its images, shuffled."""
    found = {}
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        found[child.name] = sorted(p for p in child.iterdir() if p.suffix.lower() in SUFFIXES)
        rng.shuffle(found[child.name])
    return found


def take(pool: dict[str, list[Path]], count: int) -> list[tuple[str, Path]]:
    """Removes `count` images from `pool`, equally many of each class; the first classes give one more where it does not divide."""
    share, more = divmod(count, len(pool))
    taken = []
    for number, (name, paths) in enumerate(pool.items()):
        wanted = share + (number < more)
        if len(paths) < wanted:
            raise SystemExit(f"class {name!r} has {len(paths)} images left, {wanted} are needed")
        taken += [(name, paths.pop()) for _ in range(wanted)]
    return taken


def place(chosen: list[tuple[str, Path]], folder: Path, copy: bool) -> None:
    for name, path in chosen:
        target = folder / name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(path, target)
        else:
            target.symlink_to(path.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="made anew; must not exist")
    for part, count in (("train", 800), ("valid", 400), ("test", 400)):
        parser.add_argument(f"--{part}", type=int, default=count, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy", action="store_true", help="copy instead of linking")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists already; remove it or name another")
    rng = random.Random(args.seed)
    whole = not (args.source / "train").is_dir()
    learn = images(args.source if whole else args.source / "train", rng)
    held_out = learn if whole else images(args.source / "test", rng)
    place(take(learn, args.train), args.out / "train", args.copy)
    place(take(learn, args.valid), args.out / "valid", args.copy)
    place(take(held_out, args.test), args.out / "test", args.copy)
    print(
        f"{args.out}: {args.train} train, {args.valid} valid, {args.test} test images of {len(learn)} classes"
    )


if __name__ == "__main__":
    main()
