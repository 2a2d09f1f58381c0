"""Which training images keep their labels: all, a list file's, or a share of each class."""

from pathlib import Path

import numpy as np

from convert.errors import UserError
from pretrain.sources import ImageList
from pretrain.views import generator


def labelled(images: ImageList, labels: str, seed: int) -> tuple[int, ...]:
    """Return the places of the images to learn from, in order.

    Args:
        images: the training set.
        labels: empty: all; `1%`: that share of each class, one image at least, drawn from the seed;
            else a file with an image's name a line, as SimCLR's 1percent.txt has them.
        seed: of the draw.

    Raises:
        UserError: the share makes no sense, the file cannot be read, names an image that is not
            there or one twice, or leaves a class without an image.
    """
    if not labels:
        return tuple(range(len(images)))
    if labels.endswith("%"):
        return _share(images, labels, seed)
    return _listed(images, Path(labels))


def _share(images: ImageList, labels: str, seed: int) -> tuple[int, ...]:
    try:
        share = float(labels.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"labels is {labels}, want a share above 0% and up to 100%, as labels 10%")
    draw = np.random.default_rng(generator(seed, "labels").initial_seed())
    classes = np.array(images.labels)
    drawn = []
    for label in range(len(images.classes)):
        places = np.flatnonzero(classes == label)
        drawn.append(draw.permutation(places)[: max(round(share * len(places)), 1)])
    return tuple(np.sort(np.concatenate(drawn)).tolist())


def _listed(images: ImageList, file: Path) -> tuple[int, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels {file}: cannot be read ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    known: dict[str, int] = {}
    for place, path in enumerate(images.paths):
        known[path.name] = place  # of SimCLR's lists; on ImageNet a name tells the class too
        known[path.relative_to(images.root).as_posix()] = place
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"labels {file}: {len(unknown)} of {len(names)} lines name no image in {images.root}, "
            f"'{unknown[0]}' first"
        )
    short = [path.name for path in images.paths]
    if any("/" not in name for name in names) and len(set(short)) < len(short):
        raise UserError(
            f"labels {file}: several classes have images of the same name in {images.root}; want "
            "CLASS/NAME in each line"
        )
    places = [known[name] for name in names]
    if len(set(places)) < len(places):
        raise UserError(f"labels {file}: names an image twice")
    missing = sorted(set(range(len(images.classes))) - {images.labels[place] for place in places})
    if missing:
        raise UserError(
            f"labels {file}: leaves class '{images.classes[missing[0]]}' without an image "
            f"({len(missing)} such classes)"
        )
    return tuple(sorted(places))
