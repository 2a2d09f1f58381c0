"""Files that are no images, found before a run begins and left out of its list.

A run's order and views are drawn from an image's number in the list. A broken file that was met in
training could only be replaced, which gives some other image twice and moves the numbers of a run
without that file. So every file is decoded once, before the list is final, and the verdicts are
remembered: a run on a folder equals, to the last bit, a run on the folder without what is skipped,
on any number of workers and processes. It takes as long as the decoding of one epoch at an eighth
of the size, once in the life of a set; at the next start only files that are new or have another
size or date are read.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import PIL
import torch

from convert.errors import UserError
from convert.files import write_text
from convert.progress import Progress
from pretrain import decoding, distributed
from pretrain.checks import loading_workers
from pretrain.config import PretrainConfig
from pretrain.listing import Memory, stamp
from pretrain.sources import EMBEDDED, ArrayList, ImageList, named, open_set
from pretrain.workers import load

SKIPPED_NAME = "skipped.txt"
MISSING = "no such file"
AT_ONCE = 4096  # files that a process reads before it hears of the others
FEW = 256  # so few files are read without helpers

Verdict = str | UserError  # why a file cannot be used, nothing if it can; or why nobody knows


def open_usable(
    config: PretrainConfig, *, quiet: bool = False
) -> tuple[ImageList, ImageList | None]:
    """Open the set that a config names, without the files that cannot be used.

    The first process of a group looks, and all train on what it found.

    Returns:
        The training images, and the labelled ones to vote on where there are any.

    Raises:
        UserError: see `open_set` and `skip_faulty`.
    """
    opened = distributed.share(_open(config.data) if distributed.rank() == 0 else None)
    if isinstance(opened, UserError):
        raise opened
    train, val = opened
    if config.data == EMBEDDED:  # its files are this program's own
        return train, val
    train, val = (
        part
        and skip_faulty(
            part,
            min_side=config.min_side,
            max_bad_share=config.max_bad_share,
            workers=loading_workers(config.workers),
            quiet=quiet,
        )
        for part in (train, val)
    )
    if len(train) == 1:
        raise UserError(
            f"images {config.data}: one image is left, {train.name(0)}, and {len(train.skipped)} "
            "cannot be used; contrast needs others to tell it from"
        )
    return train, val


def _open(data: str) -> tuple[ImageList, ImageList | None] | UserError:
    try:
        return open_set(data)
    except UserError as error:  # the other processes must hear of it too
        return error


def skip_faulty(
    images: ImageList,
    *,
    min_side: int,
    max_bad_share: float,
    workers: int = 0,
    quiet: bool = False,
) -> ImageList:
    """Return the images without those that cannot be used. Every process of a group calls it.

    Args:
        images: listed, and the same everywhere.
        min_side: the least width and height of an image, in pixels.
        max_bad_share: stop where a larger share is bad, 0..1.
        workers: processes that read files, on each machine.
        quiet: show no progress.

    Raises:
        UserError: too many are bad, or a file cannot be read.
    """
    if isinstance(images, ArrayList):
        return images
    memory = _Verdicts(images, min_side)
    faults, unread = distributed.share(memory.recall() if distributed.rank() == 0 else None)
    total = len(images)
    quiet = quiet or distributed.rank() > 0 or len(unread) <= AT_ONCE  # that is seconds
    shown = Progress(len(unread), "check images", quiet=quiet)
    step = AT_ONCE * distributed.size()
    done = 0
    try:
        with shown:
            _refuse_too_many(images, faults, total - len(unread), max_bad_share)
            for first in range(0, len(unread), step):
                part = unread[first : first + step]
                mine = part[distributed.rank() :: distributed.size()]
                for found in distributed.collect(_judge(images, mine, min_side, workers)):
                    faults |= found
                done = first + len(part)
                _refuse_unread(images, faults)
                _refuse_too_many(images, faults, total - len(unread) + done, max_bad_share)
                shown.add(len(part))
    finally:
        if done and distributed.rank() == 0:
            memory.remember(faults, set(unread[done:]))
    _refuse_missing(images, faults)
    return images.without(faults)


def write_skipped(folder: Path, *parts: ImageList | None) -> int:
    """Write `skipped.txt`, a line for each file left out; return how many there are."""
    lines = [f"{name}\t{why}\n" for part in parts if part for name, why in part.skipped]
    if lines:
        write_text(folder / SKIPPED_NAME, "".join(lines))
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)
    return len(lines)


class _Check(torch.utils.data.Dataset[tuple[int, Verdict]]):
    def __init__(self, images: ImageList, min_side: int) -> None:
        self.images = images
        self.min_side = min_side

    def __getitem__(self, index: int) -> tuple[int, Verdict]:
        try:
            return index, decoding.fault_of(self.images.data(index), self.min_side)
        except FileNotFoundError:
            return index, MISSING
        except UserError as error:
            return index, error
        except OSError as error:  # what the network or the rights of a file are today is no verdict
            reason = error.strerror or str(error) or type(error).__name__
            return index, UserError(f"image {self.images.name(index)}: cannot be read ({reason})")


def _judge(
    images: ImageList, places: Sequence[int], min_side: int, workers: int
) -> dict[int, Verdict]:
    """Return what is wrong with some of the images, by their places."""
    helpers = 0 if len(places) <= FEW else -(-workers // distributed.local_size())
    batches = [places[i : i + 64] for i in range(0, len(places), 64)]
    judged = load(_Check(images, min_side), batches, helpers, list)
    return {index: verdict for batch in judged for index, verdict in batch if verdict}


class _Verdicts:
    """What is known of a set's files from earlier starts."""

    def __init__(self, images: ImageList, min_side: int) -> None:
        self.images = images
        self.names = images.names
        self.stamps = [[0, 0]] * len(images) if images.stamps is None else images.stamps.tolist()
        place = str(Path(images.root).absolute())
        self.memory = Memory("verdicts", place, min_side, decoding.VERSION, PIL.__version__)

    def recall(self) -> tuple[dict[int, Verdict], list[int]]:
        """Return the faults known, by place, and the places of which nothing is known."""
        content = self.memory.read() or {"names": [], "stamps": [], "faults": {}, "digest": ""}
        faults: dict[int, Verdict]
        if content["digest"] == self._digest():
            faults = {int(place): why for place, why in content["faults"].items()}
            unread = set()
        else:
            known = dict(zip(content["names"], content["stamps"], strict=True))
            why = {content["names"][int(place)]: text for place, text in content["faults"].items()}
            rows = enumerate(zip(self.names, self.stamps, strict=True))
            unread = {i for i, (name, seen) in rows if known.get(name) != seen}
            faults = {i: why[name] for i, name in enumerate(self.names) if name in why}
        # Bad files are few: look at each, as one may have been mended in its place.
        unread |= {i for i in faults if self._changed(i)}
        return {i: why for i, why in faults.items() if i not in unread}, sorted(unread)

    def _changed(self, index: int) -> bool:
        paths = self.images.paths
        return len(paths) == len(self.names) and list(stamp(paths[index])) != self.stamps[index]

    def remember(self, faults: dict[int, Verdict], unread: set[int]) -> None:
        """Keep the verdicts, and of the files that were not read that nothing is known."""
        kept = [i for i in range(len(self.names)) if i not in unread]
        places = {index: place for place, index in enumerate(kept)}
        told = {str(places[i]): why for i, why in faults.items() if isinstance(why, str)}
        if len(told) < len(faults):
            return  # a file could not be read at all
        self.memory.write(
            {
                "digest": "" if unread else self._digest(),
                "names": [self.names[i] for i in kept],
                "stamps": [self.stamps[i] for i in kept],
                "faults": told,
            }
        )

    def _digest(self) -> str:
        lines = hashlib.sha256()
        for name, seen in zip(self.names, self.stamps, strict=True):
            lines.update(f"{name}\t{seen}\n".encode("utf-8", "surrogateescape"))
        return lines.hexdigest()


def _refuse_unread(images: ImageList, faults: dict[int, Verdict]) -> None:
    errors = [why for why in faults.values() if isinstance(why, UserError)]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; mend its rights or the disk, or remove it")


def _refuse_missing(images: ImageList, faults: dict[int, Verdict]) -> None:
    if images.paths:
        return  # a dangling link in a folder is a broken file like others
    gone = [images.name(i) for i in sorted(faults) if faults[i] == MISSING]
    if gone:
        raise UserError(
            f"list {images.root}: {len(gone)} of {len(images)} files are missing: {named(gone)}"
        )


def _refuse_too_many(
    images: ImageList, faults: dict[int, Verdict], seen: int, max_bad_share: float
) -> None:
    total, bad = len(images), len(faults)
    if bad <= max_bad_share * total and bad < total:
        return
    of = f"{bad} of {total}" if seen == total else f"{bad} of the first {seen} (of {total})"
    first = named([f"{images.name(i)} ({faults[i]})" for i in sorted(faults)])
    raise UserError(
        f"images {images.root}: {of} cannot be used, {100 * bad / seen:.1f}%, and max_bad_share "
        f"{max_bad_share:g} allows {100 * max_bad_share:g}%: {first}; mend or remove them, or "
        "raise max_bad_share"
    )
