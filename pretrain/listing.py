"""What lies in a folder: listed once, remembered until a folder in it changes.

A folder's time of change moves when a file is added, removed, renamed or replaced by renaming, so
that one look at each folder takes the place of one at each file. What it cannot tell is a file that
was written into in place: its stamp stays the old one until something else changes beside it.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from convert.errors import UserError
from convert.files import atomic_write, cache_folder

Stamps = NDArray[np.int64]  # (M, 2) size in bytes and time of change in ns of each file
GONE = (-1, -1)  # the stamp of a name without a file, such as a dangling link
# A folder that changed just before it was listed may have changed once more in the same tick of its
# file system's clock.
SETTLED_NS = 2_000_000_000


class Names(Sequence[str]):
    """Strings in one block of memory: a million names are one object, not a million.

    Processes that load images share their parent's memory until something is written to it, and
    Python writes to an object's reference count whenever it is read.
    """

    def __init__(self, names: Collection[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        found = self._block[self._ends[place] : self._ends[place + 1]]
        return found.decode("utf-8", "surrogateescape")


class Paths(Sequence[Path]):
    """Files below a folder, by compact names."""

    def __init__(self, root: Path, names: Collection[str]) -> None:
        self.root = root
        self.names = Names(names)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self.root / name for name in self.names[index]]
        return self.root / self.names[index]


@dataclass
class Folder:
    """One folder as it was when it was listed.

    Attributes:
        changed_ns: its own time of change.
        folders: names of the folders in it, sorted.
        files: name -> (size in bytes, time of change in ns), of the files that were asked for.
    """

    changed_ns: int
    folders: list[str] = field(default_factory=list)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def holds(self, changed_ns: int, listed_ns: int) -> bool:
        """Tell whether it is still as it was when it was listed."""
        settled = changed_ns < listed_ns - SETTLED_NS
        # What a dangling link points to may come back, which does not change the link's folder.
        return changed_ns == self.changed_ns and settled and GONE not in self.files.values()


Tree = dict[str, Folder]  # by the path below the root, "" for the root itself


def list_tree(root: Path, suffixes: Collection[str], *, remember: bool = False) -> Tree:
    """List the files with some suffixes in a folder and all below it, links followed.

    Names that begin with a dot are left out, as a file browser does: they are caches and the halves
    of files that other systems leave behind.

    Args:
        root: the folder.
        suffixes: of the names wanted, in lower case, with their dot.
        remember: look only at folders that changed since the last time.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    root = Path(os.path.abspath(root))  # noqa: PTH100  (links in it stay)
    memory = Memory("listing", str(root), sorted(suffixes))
    known, listed_ns = _recall(memory) if remember else ({}, 0)
    tree: Tree = {}
    now, looked = time.time_ns(), 0
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    try:
        while pending:
            below, parents = pending.pop()
            status = os.stat(root / below)  # noqa: PTH116
            me = (status.st_dev, status.st_ino)
            if me in parents:  # a link to a folder above it
                continue
            before = known.get(below)
            if before is None or not before.holds(status.st_mtime_ns, listed_ns):
                before = _look(root / below, status.st_mtime_ns, suffixes)
                looked += 1
            tree[below] = before
            pending += [(_join(below, name), (*parents, me)) for name in before.folders]
    except OSError as error:
        raise UserError(f"images {root}: cannot be listed ({error.strerror})") from error
    if remember and (looked or len(tree) != len(known)):
        _store(memory, tree, now)
    return tree


def _look(folder: Path, changed_ns: int, suffixes: Collection[str]) -> Folder:
    found = Folder(changed_ns)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:  # noqa: PTH122
                found.files[entry.name] = stamp(entry)
    found.folders.sort()
    return found


def stamp(file: "os.DirEntry[str] | Path") -> tuple[int, int]:
    """Return a file's size in bytes and time of change in ns; `GONE` where there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return GONE
    return status.st_size, status.st_mtime_ns


def _join(below: str, name: str) -> str:
    return f"{below}/{name}" if below else name


def files_of(tree: Tree, below: str = "") -> tuple[list[str], Stamps]:
    """Return the names of a tree's files, relative to its root, and their stamps.

    Args:
        tree: of `list_tree`.
        below: only the files in this folder of it and in those below it.

    Returns:
        The names, sorted folder by folder as a person would.
    """
    chosen = [f for f in tree if not below or f == below or f.startswith(below + "/")]
    found = [(_join(f, name), seen) for f in chosen for name, seen in tree[f].files.items()]
    found.sort(key=lambda item: item[0].split("/"))
    return [name for name, _ in found], as_stamps([seen for _, seen in found])


def as_stamps(stamps: Sequence[tuple[int, int]]) -> Stamps:
    """Return stamps as an array (M, 2)."""
    return np.array(stamps, np.int64).reshape(-1, 2)


def stamp_files(paths: Sequence[Path]) -> Stamps:
    """Look at each file of a list, or, where no folder of theirs has changed, at none.

    Returns:
        (M, 2), with -1 for a file that is missing.

    Raises:
        UserError: a file cannot be looked at.
    """
    digest = hashlib.sha256("\0".join(map(str, paths)).encode("utf-8", "surrogateescape"))
    memory = Memory("stamps", digest.hexdigest())
    now = time.time_ns()
    folders = {str(folder): _folder_ns(folder) for folder in {path.parent for path in paths}}
    content = memory.read()
    if content and content["folders"] == folders and list(GONE) not in content["stamps"]:
        newest = max(folders.values(), default=0)
        if newest < content["listed_ns"] - SETTLED_NS:
            return as_stamps(content["stamps"])
    try:
        stamps = [stamp(path) for path in paths]
    except OSError as error:
        raise UserError(f"image {error.filename}: cannot be read ({error.strerror})") from error
    memory.write({"listed_ns": now, "folders": folders, "stamps": stamps})
    return as_stamps(stamps)


def _folder_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:  # its files will be found missing one by one
        return -1


class Memory:
    """One JSON file in the user's cache. Losing it costs time and nothing else.

    Args:
        words: what it is about; together they are its name.
    """

    def __init__(self, *words: object) -> None:
        name = hashlib.sha256(json.dumps(words, ensure_ascii=True).encode()).hexdigest()[:20]
        self._name = f"{words[0]}-{name}.json"

    def read(self) -> Any:
        """Return what was written last; None where there is nothing that can be read."""
        try:
            return json.loads(self._path().read_text(encoding="ascii"))
        except (OSError, ValueError, UserError):
            return None

    def write(self, content: object) -> None:
        """Replace it; where there is no room for a cache, the next start looks again."""
        with contextlib.suppress(UserError), atomic_write(self._path()) as temporary:
            temporary.write_text(json.dumps(content), encoding="ascii")

    def _path(self) -> Path:
        return cache_folder() / "images" / self._name


def _recall(memory: Memory) -> tuple[Tree, int]:
    content = memory.read()
    if not content:
        return {}, 0
    return dict(_unpack(content["folders"])), content["listed_ns"]


def _unpack(rows: list[Any]) -> Iterator[tuple[str, Folder]]:
    for below, changed_ns, folders, names, sizes, times in rows:
        files = dict(zip(names, zip(sizes, times, strict=True), strict=True))
        yield below, Folder(changed_ns, folders, files)


def _store(memory: Memory, tree: Tree, now: int) -> None:
    rows = []
    for below, folder in tree.items():
        sizes = [size for size, _ in folder.files.values()]
        times = [ns for _, ns in folder.files.values()]
        rows.append([below, folder.changed_ns, folder.folders, list(folder.files), sizes, times])
    memory.write({"listed_ns": now, "folders": rows})
