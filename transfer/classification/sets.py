"""The images of a classification protocol: what is learnt from, what is judged on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import UserError
from pretrain.embedded import embedded_root
from pretrain.sources import ImageList, image_folder, train_folder


@dataclass(frozen=True)
class Sets:
    """A classification set: the images to learn from and the images to be judged on."""

    name: str
    train: ImageList
    val: ImageList

    def as_dict(self) -> dict[str, Any]:
        """Describe the set for a record."""
        parts = {"train": self.train, "val": self.val}
        described = {
            name: {"images": len(part), "listing": part.listing_hash()}
            for name, part in parts.items()
        }
        return {"name": self.name, "classes": len(self.train.classes), **described}


def open_sets(folder: Path | None) -> Sets:
    """List the images of a folder with `train/` and `val/`, or of the embedded digits.

    Raises:
        UserError: a folder is missing, unreadable or empty, or the two have different classes.
    """
    root = embedded_root() / "digits" if folder is None else folder
    train = image_folder(train_folder(root))
    if not (root / "val").is_dir():
        raise UserError(f"images {root}: has no val/ in it; want {root}/val/CLASS/IMAGE.jpg")
    val = image_folder(root / "val")
    if train.classes != val.classes:
        only = {
            name: sorted(set(a.classes) - set(b.classes))
            for name, a, b in (("train", train, val), ("val", val, train))
        }
        found = "; ".join(f"only in {k}/: {', '.join(v[:3])}" for k, v in only.items() if v)
        raise UserError(f"images {root}: train/ and val/ have different class folders ({found})")
    return Sets("embedded digits" if folder is None else str(folder), train, val)
