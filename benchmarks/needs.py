"""The data that a suite's jobs read: where it belongs, and what of it is missing.

`benchmarks/data.yaml` lists the sets, a suite may add its own:

    NAME: {title, at: "{root}/folder", files: [what must be there, below `at`]}

A root is named on the command line (`--data imagenet=PATH`) or by a variable: `datasets`, where
Detectron2 looks for VOC and COCO, by DETECTRON2_DATASETS; any other by its own name, IMAGENET_DIR.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import UserError, nearest

DETECTION = "datasets"
DETECTION_VARIABLE = "DETECTRON2_DATASETS"
_ROOT = re.compile(r"\{(\w+)\}")
KEYS = ("title", "at", "files")


@dataclass(frozen=True)
class Placed:
    """A set at its place.

    Attributes:
        title: for people.
        roots: the folders that its place is written with; those that are not known are left out.
        at: its place; None: a root of it is not known.
        files: what must be there, below its place.
        hint: how its place can be named.
    """

    title: str
    roots: Mapping[str, Path]
    at: Path | None
    files: tuple[str, ...]
    hint: str

    def missing(self) -> list[str]:
        """Say in a line all that is missing and where it belongs; nothing where all is there."""
        if self.at is None:
            return [f"{self.title}: {self.hint}; it must hold {', '.join(self.files)}"]
        lost = [file for file in self.files if not (self.at / file).exists()]
        if not lost:
            return []
        count = f"{len(lost)} of {len(self.files)} missing" if len(self.files) > 1 else "missing"
        return [f"{self.title}: in {self.at} {count}: {', '.join(lost)}; {self.hint}"]

    def fingerprint(self) -> dict[str, int | None]:
        """Return what shows that a set was exchanged: the sizes of its files, not their place."""
        if self.at is None:
            return {}
        paths = {file: self.at / file for file in self.files}
        return {f: p.stat().st_size if p.is_file() else None for f, p in paths.items()}


@dataclass(frozen=True)
class DataSet:
    """A set as `data.yaml` says it; see there."""

    name: str
    title: str
    at: str
    files: tuple[str, ...]

    @property
    def roots(self) -> tuple[str, ...]:
        """The names of the folders that its place is written with."""
        return tuple(_ROOT.findall(self.at))

    def placed(self, roots: Mapping[str, Path]) -> Placed:
        """Put it at its place."""
        known = {name: roots[name] for name in self.roots if name in roots}
        whole = len(known) == len(self.roots)
        at = Path(_ROOT.sub(lambda m: str(known[m[1]]), self.at)) if whole else None
        ways = [f"--data {name}=PATH or {variable(name)}" for name in self.roots]
        return Placed(self.title, known, at, self.files, f"name the folder by {', '.join(ways)}")


def read_sets(content: Any, where: str) -> dict[str, DataSet]:
    """Read the sets of a file.

    Raises:
        UserError: they are not well formed.
    """
    sets = {}
    for name, value in content.items() if isinstance(content, dict) else [("data", content)]:
        files = value.get("files") if isinstance(value, dict) else None
        if not isinstance(files, list) or set(value) != set(KEYS) or not files:
            raise UserError(f"{where}: data {name}: found {value!r}, want {', '.join(KEYS)}")
        sets[str(name)] = DataSet(
            str(name), str(value["title"]), str(value["at"]), tuple(map(str, files))
        )
    return sets


def find_roots(sets: Mapping[str, DataSet], words: Sequence[str]) -> dict[str, Path]:
    """Find the folders of data: those of the command line, then of variables.

    Args:
        sets: all that a suite may read.
        words: `NAME=PATH` of the command line.

    Raises:
        UserError: a word is no such pair, or names what no set asks for.
    """
    known = dict.fromkeys(root for found in sets.values() for root in found.roots)
    named = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign or not path or name not in known:
            names = nearest(name, known) if known else "none: its jobs read no data of yours"
            raise UserError(f"--data {word}: want NAME=PATH; names of this suite: {names}")
        named[name] = path
    places = {name: named.get(name) or os.environ.get(variable(name)) for name in known}
    places[DETECTION] = places.get(DETECTION) or DETECTION  # as Detectron2 has it
    return {name: Path(path).expanduser().absolute() for name, path in places.items() if path}


def variable(root: str) -> str:
    """Return the variable that names a folder of data."""
    return DETECTION_VARIABLE if root == DETECTION else f"{root.upper()}_DIR"
