"""Tar shards in WebDataset's layout: files of one sample lie side by side and share a key.

`n01/0007.jpg` and `n01/0007.cls` are one sample. A shard is read through once, header by header,
and where its images lie is remembered; after that an image is one read at one place. So shards have
the order of a folder: every image has its number, an epoch is a permutation of all of them, and a
run stopped in the middle of one goes on exactly, on any number of workers and processes. Of a set,
memory holds the shards' names and some forty bytes an image; the images' names stay on disk.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import UserError
from pretrain.listing import Memory, Paths, stamp
from pretrain.sources import SUFFIXES, ImageList, named

BLOCK = 512  # tar's unit, bytes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class ShardList(ImageList):
    """Images in shards; `paths` are the shards.

    Attributes:
        shard: (M,) which shard each image lies in.
        offset, size: (M,) where, in bytes.
    """

    shard: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    offset: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    size: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, index: int) -> str:
        """Return an image's shard and its name in there, which is read from the shard."""
        path, offset = self.paths[int(self.shard[index])], int(self.offset[index])
        try:
            with path.open("rb") as file:
                file.seek(offset - BLOCK)
                header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            return f"{path}:{header.name}"
        except (OSError, tarfile.TarError):
            return f"{path}: byte {offset}"

    @property
    def names(self) -> Sequence[str]:
        """Shards and places in them."""
        pairs = zip(self.shard.tolist(), self.offset.tolist(), strict=True)
        shards = [str(path) for path in self.paths]
        return [f"{shards[shard]}@{offset}" for shard, offset in pairs]

    def data(self, index: int) -> bytes:
        """Read one image out of its shard."""
        size = int(self.size[index])
        with self.paths[int(self.shard[index])].open("rb", buffering=0) as file:
            found = os.pread(file.fileno(), size, int(self.offset[index]))
        if len(found) < size:
            raise OSError("the shard is shorter than when it was listed")
        return found

    def _chosen(self, kept: np.ndarray) -> "ShardList":
        return replace(self, shard=self.shard[kept], offset=self.offset[kept], size=self.size[kept])


def expand(pattern: str) -> list[Path]:
    """List the shards that a pattern names, sorted as it counts: `{000..146}`, `{a,b}`, `*`, `?`.

    Raises:
        UserError: some or all of them are missing.
    """
    found: list[Path] = []
    for name in _braces(pattern):
        path = Path(name)
        if any(letter in path.name for letter in "*?["):
            found += sorted(path.parent.glob(path.name))
        else:
            found.append(path)
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise UserError(
            f"shards {pattern}: {len(missing)} of {len(found)} are missing: "
            f"{named(missing) or 'none is found'}; want .tar files, as DIR/{{000..146}}.tar"
        )
    return found


def _braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(found[1])
    words = found[1].split(",")
    if numbers:
        first, last = numbers[1], numbers[2]
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    for word in words:
        yield from _braces(pattern[: found.start()] + word + pattern[found.end() :])


def open_shards(root: Path, shards: Sequence[Path]) -> ShardList:
    """List the images of shards, each shard read through at most once in its life.

    Args:
        root: what they are called together.
        shards: in their order.

    Raises:
        UserError: a shard is cut short, packed, or no tar; none holds an image; some of the images
            have a class and others have none.
    """
    indexes = [_remembered(path) for path in shards]
    counts = [len(index["offsets"]) for index in indexes]
    if not sum(counts):
        raise UserError(
            f"shards {root}: {len(shards)} shards, {named([str(path) for path in shards])}, hold "
            f"no image; want files that end in {', '.join(SUFFIXES[:4])} and the like in them"
        )
    labels, classes = _classes(root, [word for index in indexes for word in index["classes"]])
    sizes = np.array([size for index in indexes for size in index["sizes"]], np.int64)
    dates = np.repeat([index["stamp"][1] for index in indexes], counts)
    return ShardList(
        root,
        Paths(Path(), [str(path) for path in shards]),
        labels,
        classes,
        np.stack([sizes, dates], axis=1),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        offset=np.array([place for index in indexes for place in index["offsets"]], np.int64),
        size=sizes.astype(np.int32),
    )


def _classes(root: Path, words: list[str | None]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    told = {word for word in words if word is not None}
    if not told:
        return (), ()
    without = words.count(None)
    if without:
        raise UserError(
            f"shards {root}: {without} of {len(words)} images have no class (.cls, or a label in "
            ".json) and the others have one; want it for all of them, or for none"
        )
    number = all(word.isdecimal() for word in told)
    classes = tuple(sorted(told, key=lambda word: (int(word) if number else 0, word)))
    places = {word: label for label, word in enumerate(classes)}
    return tuple(places[word] for word in words if word is not None), classes


def _remembered(path: Path) -> dict[str, Any]:
    memory, seen = Memory("shard", str(path.absolute())), list(stamp(path))
    index: dict[str, Any] | None = memory.read()
    if index is None or index["stamp"] != seen:
        index = {"stamp": seen, **_index(path)}
        memory.write(index)
    return index


def _index(path: Path) -> dict[str, Any]:
    """Read a shard's headers: where its images lie, and each one's class if it has one."""
    samples: dict[str, dict[str, Any]] = {}
    members = 0
    try:
        with path.open("rb") as file:
            packed = COMPRESSED.get(file.read(2))
            file.seek(0)
            length = os.fstat(file.fileno()).st_size
            if packed:
                raise UserError(
                    f"shard {path}: is packed with {packed}, so that no image can be read alone; "
                    "unpack it: images hardly get smaller"
                )
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    blocks = -(-member.size // BLOCK)
                    if member.offset_data + blocks * BLOCK > length:
                        raise _cut(path, members, member.offset, length, member.name)
                    members += 1
                    if member.isfile():
                        _take(samples, archive, member)
                _check_end(path, file, archive, members, length)
    except tarfile.TarError as error:
        raise UserError(
            f"shard {path}: is no tar file after {members} files ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"shard {path}: cannot be read ({error.strerror})") from error
    images = [sample for sample in samples.values() if "offset" in sample]
    return {
        "offsets": [sample["offset"] for sample in images],
        "sizes": [sample["size"] for sample in images],
        "classes": [sample.get("class") for sample in images],
    }


def _cut(path: Path, members: int, start: int, length: int, name: str) -> UserError:
    return UserError(
        f"shard {path}: ends in the middle: {members} files could be read, up to byte {start} of "
        f"the {length} there are, and {name} is cut; fetch it again, or remove it"
    )


def _check_end(path: Path, file: Any, archive: Any, members: int, length: int) -> None:
    """Refuse a shard without the empty block that ends every tar: tarfile would not miss it."""
    file.seek(archive.offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise _cut(path, members, archive.offset, length, "what comes next")
    if block != bytes(BLOCK):
        raise UserError(
            f"shard {path}: is damaged after {members} files, at byte {archive.offset} of "
            f"{length}; fetch it again, or remove it"
        )


def _take(samples: dict[str, dict[str, Any]], archive: Any, member: tarfile.TarInfo) -> None:
    """Add a file to its sample: the first image, and the class."""
    folder, _, base = member.name.rpartition("/")
    if base.startswith("."):
        return
    stem, _, suffix = base.partition(".")
    sample = samples.setdefault(f"{folder}/{stem}", {})
    suffix = suffix.lower()
    if f".{suffix}" in SUFFIXES and "offset" not in sample:
        sample |= {"offset": member.offset_data, "size": member.size}
    elif suffix == "cls":
        sample["class"] = archive.extractfile(member).read().decode("utf-8", "replace").strip()
    elif suffix == "json" and "class" not in sample:
        word = _label(archive.extractfile(member).read())
        if word is not None:
            sample["class"] = word


def _label(data: bytes) -> str | None:
    try:
        content = json.loads(data)
    except ValueError:
        return None
    found = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    return str(found) if isinstance(found, str | int) else None
