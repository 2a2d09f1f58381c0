"""Where images come from: folders with and without classes, lists, shards, CIFAR-10, the embedded.

However they lie, they are a list with a fixed order and a fixed number for each image: order,
views and a memory bank's entries of a run depend on those numbers alone.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convert.errors import UserError
from pretrain.decoding import Undecodable, decode, decode_array
from pretrain.embedded import embedded_root
from pretrain.listing import GONE, Names, Paths, Stamps, Tree, files_of, list_tree, stamp_files

EMBEDDED = "embedded"  # the word that names the set which is built, not downloaded

TORCHVISION = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SUFFIXES = (*TORCHVISION, ".gif", ".jfif", ".pbm")
SHARD = ".tar"
TINY_IMAGENET_TABLE = "val_annotations.txt"
NAMED = 3  # of many bad files, how many an error names
Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class ImageList:
    """Images with their classes; these are files on disk, and subclasses say where else they lie.

    Attributes:
        root: what the names are relative to.
        paths: one a image, sorted by class, then by name.
        labels: the class index of each image; empty where there are no classes.
        classes: class names, sorted; their place is the index.
        stamps: (M, 2) sizes and times of the files when they were listed; None: not looked at.
        skipped: names of the files that were left out, and why.
    """

    root: Path
    paths: Sequence[Path]
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    stamps: Stamps | None = field(default=None, compare=False, repr=False)
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return an image's name, for people."""
        return str(self.paths[index])

    def data(self, index: int) -> bytes:
        """Read one image's file, whatever it holds.

        Raises:
            OSError: it cannot be read.
        """
        return self.paths[index].read_bytes()

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            UserError: the file is gone, or is no image.
        """
        return _decoded(self, index, decode)

    def array(self, index: int) -> NDArray[np.uint8]:
        """Decode one image to the same pixels, (H, W, 3), by the fastest decoder at hand.

        Raises:
            UserError: as `read`.
        """
        return _decoded(self, index, decode_array)

    def listing_hash(self) -> str:
        """Hash names, classes and sizes of all files, so that a changed folder is noticed.

        Raises:
            UserError: a file cannot be looked at, as a link to nowhere.
        """
        lines = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(
                    f"image {path}: cannot be read ({error.strerror}); mend or remove it"
                ) from error
            lines.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
        return lines.hexdigest()

    @property
    def names(self) -> Sequence[str]:
        """What tells the images apart within the set: paths below the root."""
        if isinstance(self.paths, Paths):
            return self.paths.names
        return [str(path.relative_to(self.root)) for path in self.paths]

    def without(self, faults: dict[int, str]) -> "ImageList":
        """Return the list without some images, as if they had never been there.

        Args:
            faults: their places, and why.
        """
        if not faults:
            return self
        kept = np.array([i for i in range(len(self)) if i not in faults], np.int64)
        skipped = [(self.name(i), faults[i]) for i in sorted(faults)]
        labels = tuple(self.labels[i] for i in kept) if self.labels else ()
        stamps = None if self.stamps is None else self.stamps[kept]
        return replace(self._chosen(kept), labels=labels, stamps=stamps, skipped=tuple(skipped))

    def _chosen(self, kept: np.ndarray) -> "ImageList":
        paths = self.paths
        if isinstance(paths, Paths):
            return replace(self, paths=Paths(paths.root, [paths.names[i] for i in kept]))
        return replace(self, paths=tuple(paths[i] for i in kept))


@dataclass(frozen=True)
class UrlList(ImageList):
    """Images behind addresses that fsspec opens: s3://, gs://, https://, memory:// and others.

    Attributes:
        urls: one an image.
    """

    urls: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.urls)

    def name(self, index: int) -> str:
        """Return an image's address."""
        return self.urls[index]

    @property
    def names(self) -> Sequence[str]:
        """The addresses."""
        return self.urls

    def data(self, index: int) -> bytes:
        """Fetch one image."""
        return fetch(self.urls[index])

    def listing_hash(self) -> str:
        """Hash the addresses: what lies behind them is not looked at."""
        return hashlib.sha256("\n".join(self.urls).encode()).hexdigest()

    def _chosen(self, kept: np.ndarray) -> "UrlList":
        return replace(self, urls=Names([self.urls[i] for i in kept]))


@dataclass(frozen=True)
class ArrayList(ImageList):
    """Images that lie decoded in memory.

    Attributes:
        pixels: (M, H, W, 3) uint8.
    """

    pixels: np.ndarray = field(default_factory=lambda: np.empty((0, 1, 1, 3), np.uint8))

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Return an image's place in the set."""
        return f"{self.root}: image {index}"

    def data(self, index: int) -> bytes:
        """Return one image as a file would hold it."""
        file = io.BytesIO()
        self.read(index).save(file, "PPM")
        return file.getvalue()

    def read(self, index: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.pixels[index])

    def array(self, index: int) -> NDArray[np.uint8]:
        """Return one image's pixels."""
        return np.array(self.pixels[index])  # a copy: torch wants memory that may be written

    def listing_hash(self) -> str:
        """Hash all pixels and labels."""
        lines = hashlib.sha256(self.pixels.tobytes())
        lines.update(repr(self.labels).encode())
        return lines.hexdigest()

    def _chosen(self, kept: np.ndarray) -> "ArrayList":
        return replace(self, pixels=self.pixels[kept])


def _decoded(images: ImageList, index: int, decoder: Callable[[bytes], Decoded]) -> Decoded:
    try:
        return decoder(images.data(index))
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"image {images.name(index)}: cannot be read ({reason})") from error
    except Undecodable as error:
        raise UserError(
            f"image {images.name(index)}: cannot be decoded ({error}); mend or remove it"
        ) from error


def read_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: the file is gone, or is no image.
    """
    return ImageList(path.parent, (path,)).read(0)


# --- folders --------------------------------------------------------------------------------------


def image_folder(root: Path, *, remember: bool = False) -> ImageList:
    """List a folder with one sub-folder a class, as torchvision's ImageFolder reads it.

    Args:
        root: the folder.
        remember: look only at folders that changed since the last time.

    Raises:
        UserError: it is missing, unreadable, or holds no class folder with images.
    """
    root = Path(root)
    return _with_classes(root, list_tree(root, SUFFIXES, remember=remember))


def _with_classes(root: Path, tree: Tree) -> ImageList:
    classes = tree[""].folders
    parts = [files_of(tree, name) for name in classes]
    if not any(names for names, _ in parts):
        raise UserError(
            f"images {root}: found {len(classes)} sub-folders and no image in them; "
            "want one sub-folder a class, as train/cat/1.jpg"
        )
    for name, (names, _) in zip(classes, parts, strict=True):
        if not names:
            raise UserError(f"images {root}: class folder '{name}' holds no image; remove it")
    names = [name for part, _ in parts for name in part]
    labels = tuple(label for label, (part, _) in enumerate(parts) for _ in part)
    stamps = np.concatenate([stamps for _, stamps in parts])
    return ImageList(root, Paths(root, names), labels, tuple(classes), stamps)


def _without_classes(root: Path, tree: Tree) -> ImageList:
    names, stamps = files_of(tree)
    if not names:
        raise UserError(
            f"images {root}: found no image in it and the {len(tree) - 1} folders below it; want "
            f"files that end in {', '.join(SUFFIXES[:4])} and the like, or {SHARD} shards"
        )
    return ImageList(root, Paths(root, names), stamps=stamps)


def train_folder(folder: Path) -> Path:
    """Return the `train` folder of an image set.

    Raises:
        UserError: the set is missing, no folder, or has no `train` in it.
    """
    folder = Path(folder)
    _want_folder(folder)
    if not (folder / "train").is_dir():
        raise UserError(
            f"images {folder}: has no train/ in it; want {folder}/train/CLASS/IMAGE.jpg"
        )
    return folder / "train"


def _want_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"images {folder}: found {found}, want a folder with train/ in it")


def _open_folder(folder: Path) -> tuple[ImageList, ImageList | None]:
    batches = cifar10_folder(folder)
    if batches is not None:
        return cifar10(batches, train=True), cifar10(batches, train=False)
    has_train = (folder / "train").is_dir()
    if not has_train and (folder / "val").is_dir():
        raise UserError(
            f"images {folder}: has val/ and no train/ in it; name {folder}/val to train on that"
        )
    train = _open_part(folder / "train" if has_train else folder, labelled=has_train)
    val_folder = folder / "val"
    if not train.labels or not has_train or not val_folder.is_dir():
        return train, None
    val = _tiny_imagenet_val(val_folder, train) or _open_part(val_folder, labelled=True)
    return train, val if val.labels else None


def _open_part(folder: Path, *, labelled: bool) -> ImageList:
    tree = list_tree(folder, (*SUFFIXES, SHARD), remember=True)
    shards = [name for name in files_of(tree)[0] if name.lower().endswith(SHARD)]
    if shards:
        from pretrain.shards import open_shards

        if any(not name.lower().endswith(SHARD) for name in files_of(tree)[0]):
            raise UserError(
                f"images {folder}: holds {len(shards)} {SHARD} shards and loose images; want one "
                "or the other: name the shards alone, as DIR/*.tar"
            )
        return open_shards(folder, [folder / name for name in shards])
    # Images beside class folders, or no folders: nothing that could be classes.
    if labelled and tree[""].folders and not tree[""].files:
        return _with_classes(folder, tree)
    return _without_classes(folder, tree)


def _tiny_imagenet_val(folder: Path, train: ImageList) -> ImageList | None:
    """List Tiny-ImageNet's val/ as it is downloaded: one folder, and a table of classes beside."""
    table = folder / TINY_IMAGENET_TABLE
    if not table.is_file():
        return None
    rows = [line.split("\t")[:2] for line in table.read_text(encoding="utf-8").splitlines() if line]
    places = {name: label for label, name in enumerate(train.classes)}
    unknown = [row for row in rows if len(row) < 2 or row[1] not in places]
    if unknown or not rows:
        raise UserError(
            f"images {table}: {len(unknown)} of {len(rows)} lines name no class folder of train/, "
            f"as {unknown[:1]}; want IMAGE<tab>CLASS"
        )
    rows.sort(key=lambda row: (places[row[1]], row[0]))
    paths = Paths(folder / "images", [name for name, _ in rows])
    labels = tuple(places[label] for _, label in rows)
    return ImageList(folder / "images", paths, labels, train.classes, _present(table, paths))


# --- lists ----------------------------------------------------------------------------------------


def read_list(file: str) -> ImageList:
    """Read a list of images: a line each, a path or an address, and after a tab its class if any.

    Paths are relative to the list's folder.

    Raises:
        UserError: the list is empty or no text, names files that are missing, mixes paths and
            addresses, or gives a class to some images only.
    """
    rows = [line.rstrip("\r").split("\t") for line in _text(file).split("\n") if line.strip()]
    if not rows:
        raise UserError(f"list {file}: names no image; want a path or an address a line")
    names = [row[0].strip() for row in rows]
    words = [row[1].strip() for row in rows if len(row) > 1]
    if len(words) not in {0, len(rows)}:
        line = next(i for i, row in enumerate(rows) if len(row) < 2)
        raise UserError(
            f"list {file}: {len(words)} of {len(rows)} lines have a class, and '{names[line]}' has "
            "none; want PATH<tab>CLASS on every line, or on none"
        )
    classes = tuple(sorted(set(words)))
    places = {name: label for label, name in enumerate(classes)}
    labels = tuple(places[word] for word in words)
    remote = [name for name in names if "://" in name]
    if remote and len(remote) < len(names):
        raise UserError(
            f"list {file}: {len(remote)} of {len(names)} lines are addresses, as {remote[0]}; want "
            "only addresses or only paths"
        )
    if remote:
        return UrlList(Path(file), (), labels, classes, urls=Names(names))
    paths = Paths(Path() if "://" in file else Path(file).parent, names)
    return ImageList(Path(file), paths, labels, classes, _present(file, paths))


def _present(file: str | Path, paths: Paths) -> Stamps:
    """Return the stamps of a list's files, or say which are missing."""
    stamps = stamp_files(paths)
    gone = np.flatnonzero((stamps == GONE).all(axis=1))
    if len(gone):
        first = ", ".join(str(paths[int(i)]) for i in gone[:NAMED])
        raise UserError(
            f"list {file}: {len(gone)} of {len(paths)} files are missing: {first}"
            f"{', ...' if len(gone) > NAMED else ''}; paths are relative to the list's folder"
        )
    return stamps


def _text(file: str) -> str:
    try:
        data = fetch(file) if "://" in file else Path(file).read_bytes()
        return data.decode("utf-8", "strict")
    except OSError as error:
        raise UserError(f"list {file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"list {file}: is no text; want a folder, or a list with a path or an address a line"
        ) from error


def fetch(url: str) -> bytes:
    """Return what lies behind an address.

    Raises:
        UserError: fsspec, or what it needs for this kind of address, is not installed.
        OSError: it cannot be had.
    """
    scheme = url.split("://", 1)[0]
    try:
        import fsspec
    except ImportError as error:
        raise UserError(f"{url}: addresses need fsspec: pip install fsspec") from error
    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {scheme}:// cannot be opened ({error})") from error


# --- CIFAR-10 -------------------------------------------------------------------------------------

CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_VAL = ("test_batch",)


def cifar10_folder(folder: Path) -> Path | None:
    """Return where CIFAR-10's python batches lie, in a folder or in the one they are packed in."""
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / CIFAR10_TRAIN[0]).is_file():
            return place
    return None


def cifar10(folder: Path, *, train: bool) -> ArrayList:
    """Read CIFAR-10 as its authors publish it for Python, without running the pickles' code.

    Raises:
        UserError: a batch is missing or damaged.
    """
    names = CIFAR10_TRAIN if train else CIFAR10_VAL
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"images {folder}: {len(missing)} of {len(names)} batches are missing: "
            f"{', '.join(missing)}; unpack cifar-10-python.tar.gz again"
        )
    pixels, labels = zip(*(_cifar10_batch(folder / name) for name in names), strict=True)
    flat = tuple(label for part in labels for label in part)
    meta = _unpickled(folder / "batches.meta") if (folder / "batches.meta").is_file() else {}
    words = meta.get("label_names") or [str(i) for i in range(10)]
    classes = tuple(str(word) for word in words)
    paths = tuple(folder / name for name in names)
    return ArrayList(folder, paths, flat, classes, pixels=np.concatenate(pixels))


def _cifar10_batch(file: Path) -> tuple[np.ndarray, list[int]]:
    content = _unpickled(file)
    pixels, labels = np.asarray(content.get("data", ())), content.get("labels", ())
    rows = pixels.shape[0] if pixels.ndim == 2 and pixels.shape[1:] == (3 * 32 * 32,) else -1
    if rows != len(labels) or pixels.dtype != np.uint8 or not set(labels) <= set(range(10)):
        raise UserError(f"images {file}: is no batch of CIFAR-10; unpack it again")
    # Stored as three planes of 32 rows each.
    planes = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(planes), [int(label) for label in labels]


def _unpickled(file: Path) -> dict[str, Any]:
    from convert.reading import InertUnpickler  # imports torch

    try:
        with file.open("rb") as opened:
            content = InertUnpickler(opened, encoding="latin1").load()
        return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in content.items()}
    except (OSError, pickle.UnpicklingError) as error:
        raise UserError(f"images {file}: cannot be read ({error}); unpack it again") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(f"images {file}: is no batch of CIFAR-10; unpack it again") from error


# --- what a config's `data` names -----------------------------------------------------------------


def open_set(data: str) -> tuple[ImageList, ImageList | None]:
    """Open the set that a config's `data` names. Nothing is decoded.

    Args:
        data: a folder: with `train/`, classes in it or not; of images, at any depth; of CIFAR-10's
            python batches; of .tar shards. Or a list file, or its address; shards, as
            `DIR/{000..146}.tar` or `DIR/*.tar`; or `embedded`.

    Returns:
        The training images, and the labelled ones of `val` where there are any.

    Raises:
        UserError: there is nothing, no image, or a single one.
    """
    train, val = _open(data)
    if len(train) == 1:
        raise UserError(
            f"images {data}: holds one image, {train.name(0)}; contrast needs others to tell it "
            "from: want a batch of them at least"
        )
    return train, val


def _open(data: str) -> tuple[ImageList, ImageList | None]:
    if data == EMBEDDED:
        return _open_folder(embedded_root() / "digits")
    if data.lower().endswith(SHARD):
        from pretrain.shards import expand, open_shards

        shards = expand(data)
        return open_shards(shards[0].parent, shards), None
    if "://" in data or Path(data).is_file():
        return read_list(data), None
    folder = Path(data)
    _want_folder(folder)
    return _open_folder(folder)


def named(names: Collection[str]) -> str:
    """Name the first of many, for an error line."""
    first = ", ".join(list(names)[:NAMED])
    return f"{first}, ..." if len(names) > NAMED else first
