"""The images of a classification protocol: what is learnt from, what is judged on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import UserError
from pretrain.embedded import embedded_root
from pretrain.sources import ImageList, image_folder, train_folder
from transfer.classification.published_sets import TaggedImages, read_published

JUDGED = ("val", "test")  # the folder of the images to be judged on: the first that is there


@dataclass(frozen=True)
class Sets:
    """A classification set: the images to learn from and the images to be judged on.

    Attributes:
        name: for people.
        train, val: what is learnt from, what is judged on.
        apart: places in `train` that the set's makers set apart for choosing; empty: none.
        metric: what the set's protocol reports: top1, mean_per_class or mAP.
    """

    name: str
    train: ImageList
    val: ImageList
    apart: tuple[int, ...] = ()
    metric: str = "top1"

    def as_dict(self) -> dict[str, Any]:
        """Describe the set for a record."""
        parts = {"train": self.train, "val": self.val}
        described = {
            name: {"images": len(part), "listing": part.listing_hash()}
            for name, part in parts.items()
        }
        return {"name": self.name, "classes": len(self.train.classes), **described}


def open_sets(folder: Path | None, *, tagged: bool = False) -> Sets:
    """List the images of a set on disk, or of the embedded digits.

    A folder holds `train/` and `val/` (or `test/`) with one folder a class in each, or is one of
    the published sets that `published_sets` knows: VOC2007, CIFAR-10 and -100, iNaturalist 2018,
    Places365, and those of the small-set suites.

    Args:
        folder: the set; None: the embedded digits.
        tagged: whether the protocol takes images with several classes.

    Raises:
        UserError: a folder is missing, unreadable or empty, its parts have different classes, or
            its images have several classes where the protocol wants one.
    """
    if folder is None:
        return _folders(embedded_root() / "digits", "embedded digits")
    published = None if (folder / "train").is_dir() else read_published(folder)
    if published is None:
        return _folders(folder, str(folder))
    if isinstance(published.train, TaggedImages) and not tagged:
        raise UserError(
            f"images {folder}: {published.name} has several classes an image, and this protocol "
            "wants one; take transfer/svm.py or transfer/logreg.py"
        )
    name = f"{published.name} in {folder}"
    return Sets(name, published.train, published.val, published.apart, published.metric)


def _folders(root: Path, name: str) -> Sets:
    train = image_folder(train_folder(root))
    judged = next((root / part for part in JUDGED if (root / part).is_dir()), None)
    if judged is None:
        raise UserError(f"images {root}: has no val/ in it; want {root}/val/CLASS/IMAGE.jpg")
    val = image_folder(judged)
    if train.classes != val.classes:
        only = {
            name: sorted(set(a.classes) - set(b.classes))
            for name, a, b in (("train", train, val), (judged.name, val, train))
        }
        found = "; ".join(f"only in {k}/: {', '.join(v[:3])}" for k, v in only.items() if v)
        raise UserError(
            f"images {root}: train/ and {judged.name}/ have different class folders ({found})"
        )
    return Sets(name, train, val)
