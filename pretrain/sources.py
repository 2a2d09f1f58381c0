"""Where images come from: class folders on disk, and the embedded set."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convert.errors import UserError
from pretrain.decoding import Undecodable, decode
from pretrain.embedded import embedded_root

EMBEDDED = "embedded"  # the word that names the set which is built, not downloaded

# Torchvision's list.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageList:
    """Images on disk with their classes.

    Attributes:
        root: the folder that holds the class folders.
        paths: one a image, sorted by class, then by name.
        labels: the class index of each image.
        classes: class names, sorted; their place is the index.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB."""
        return read_image(self.paths[index])

    def listing_hash(self) -> str:
        """Hash names, classes and sizes of all files, so that a changed folder is noticed."""
        lines = hashlib.sha256()
        for path in self.paths:
            lines.update(f"{path.relative_to(self.root)}\t{path.stat().st_size}\n".encode())
        return lines.hexdigest()


def read_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: the file is gone, or is no image.
    """
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror})") from error
    except Undecodable as error:
        raise UserError(f"image {path}: cannot be decoded ({error}); mend or remove it") from error


def image_folder(root: Path) -> ImageList:
    """List a folder with one sub-folder a class, as torchvision's ImageFolder reads it.

    Raises:
        UserError: it is missing, unreadable, or holds no class folder with images.
    """
    root = Path(root)
    try:
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        found = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
    except OSError as error:
        raise UserError(f"images {root}: cannot be listed ({error.strerror})") from error
    if not found:
        raise UserError(
            f"images {root}: found {len(classes)} sub-folders and no image in them; "
            "want one sub-folder a class, as train/cat/1.jpg"
        )
    empty = sorted(set(range(len(classes))) - {label for _, label in found})
    if empty:
        raise UserError(
            f"images {root}: class folder '{classes[empty[0]]}' holds no image; remove it"
        )
    paths, labels = zip(*found, strict=True)
    return ImageList(root, paths, labels, tuple(classes))


def train_folder(folder: Path) -> Path:
    """Return the `train` folder of an image set.

    Raises:
        UserError: the set is missing, no folder, or has no `train` in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"images {folder}: found {found}, want a folder with train/ in it")
    if not (folder / "train").is_dir():
        raise UserError(
            f"images {folder}: has no train/ in it; want {folder}/train/CLASS/IMAGE.jpg"
        )
    return folder / "train"


def open_set(data: str) -> tuple[ImageList, ImageList | None]:
    """Open the set that a config's `data` names.

    Args:
        data: a folder with train/ in it, or `embedded`.

    Returns:
        The training images, and the ones of `val` where there are any.

    Raises:
        UserError: the folder is missing, empty, or has no train/.
    """
    folder = embedded_root() / "digits" if data == EMBEDDED else Path(data)
    train = image_folder(train_folder(folder))
    val = image_folder(folder / "val") if (folder / "val").is_dir() else None
    return train, val
