"""Released checkpoints by name: where they are, what they are, and how to have them here.

A name is accepted wherever a checkpoint is. The file is fetched once into the user's cache, where
one that was put there by hand serves as well, and is held against its checksum at every use.
"""

import errno
import fcntl
import glob
import hashlib
import http.client
import itertools
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from convert.errors import UserError, nearest
from convert.files import CACHE_VARIABLE, cache_folder, write_text
from convert.pixels import CAFFE_PIXELS, IMAGENET_PIXELS, Pixels
from convert.progress import Progress

TIMEOUT_S = 30.0  # without a byte
ATTEMPTS = 5  # of a connection that breaks, before the user is asked to try again
CHUNK = 1 << 18  # bytes
MEGABYTE = 10**6
PARTIAL, RANGE_NOT_SATISFIABLE = 206, 416  # HTTP


@dataclass(frozen=True)
class Checksum:
    """A file's hash.

    Attributes:
        algorithm: a name of `hashlib`.
        digest: in hexadecimal, whole or its beginning.
    """

    algorithm: str
    digest: str


@dataclass(frozen=True)
class Published:
    """A number that was published for a checkpoint.

    Attributes:
        metric: as `linear/top1`, in percent.
        value: as printed.
        source: the paper and its table, or the page.
    """

    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Release:
    """A checkpoint that its authors released.

    Attributes:
        name: what to call it here.
        address: where it is fetched.
        checksum: None where nobody published one: then the content must be a whole backbone, and
            later uses are held against what the first one found.
        method: what trained it; epochs: how long, if said; arch: a name of `resnets.ARCHS`.
        pixels: what it expects of an image; stride_in_1x1: where a bottleneck's stride is.
        published: its numbers.
    """

    name: str
    address: str
    checksum: Checksum | None
    method: str
    epochs: int | None = None
    arch: str = "resnet50"
    pixels: Pixels = IMAGENET_PIXELS
    stride_in_1x1: bool = False
    published: tuple[Published, ...] = field(default=())

    @property
    def file_name(self) -> str:
        """The file's name, as its authors call it."""
        return self.address.rsplit("/", 1)[1]


_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_TORCHVISION = "https://download.pytorch.org/models"
_MOCO_V1, _MOCO_V2 = "arXiv:1911.05722v3", "arXiv:2003.04297"
_MOCO_PAGE = "the release's own page"


def _voc(source: str, ap50: float, ap: float, ap75: float) -> tuple[Published, ...]:
    """Faster R-CNN R50-C4, VOC trainval07+12 -> test2007, 24k iterations, mean of 5 trials."""
    values = {"voc07/AP50": ap50, "voc07/AP": ap, "voc07/AP75": ap75}
    return tuple(Published(metric, value, source) for metric, value in values.items())


# MoCo's authors and torchvision's publish the first eight digits of their checksums; the others
# are those of the same files as others have recorded them.
RELEASES = (
    Release(
        "moco_v1_200ep",
        f"{_MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
        Checksum("md5", "b251726a57be750490c34a7602b59076"),
        "MoCo v1",
        200,
        published=(
            Published("linear/top1", 60.6, f"{_MOCO_V1}, Table 1"),
            *_voc(f"{_MOCO_V1}, Table 2b", 81.5, 55.9, 62.6),
        ),
    ),
    Release(
        "moco_v2_200ep",
        f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
        Checksum("md5", "59fd9945645e27d585be89338ce9232e"),
        "MoCo v2",
        200,
        published=(
            Published("linear/top1", 67.7, f"{_MOCO_PAGE}: this file, the best of five runs"),
            Published("linear/top1", 67.5, f"{_MOCO_V2}, Table 1 (d)"),
            *_voc(f"{_MOCO_V2}, Table 1 (d)", 82.4, 57.0, 63.6),
        ),
    ),
    Release(
        "moco_v2_800ep",
        f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        Checksum("md5", "a04e12f8b0e44fdcac1fb4e06f33727b"),
        "MoCo v2",
        800,
        published=(
            Published("linear/top1", 71.1, f"{_MOCO_V2}, Table 1 (e)"),
            *_voc(f"{_MOCO_V2}, Table 1 (e)", 82.5, 57.4, 64.0),
        ),
    ),
    Release(
        "torchvision_resnet50_v1",
        f"{_TORCHVISION}/resnet50-0676ba61.pth",
        Checksum("sha256", "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"),
        "supervised, torchvision's IMAGENET1K_V1",
        published=(Published("supervised/top1", 76.13, "torchvision's ResNet50_Weights"),),
    ),
    Release(
        "torchvision_resnet50_v2",
        f"{_TORCHVISION}/resnet50-11ad3fa6.pth",
        Checksum("sha256", "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"),
        "supervised, torchvision's IMAGENET1K_V2",
        published=(Published("supervised/top1", 80.858, "torchvision's ResNet50_Weights"),),
    ),
    Release(
        "msra_resnet50",
        "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl",
        None,
        "supervised, MSRA's as Detectron2 distributes it",
        pixels=CAFFE_PIXELS,
        stride_in_1x1=True,
        published=(
            Published("supervised/top1", 75.3, "MSRA's own page: an error of 24.7 in one crop"),
        ),
    ),
)


def names() -> tuple[str, ...]:
    """Return the names that are accepted in place of a file."""
    return tuple(release.name for release in RELEASES)


def find(name: str) -> Release | None:
    """Return the release of that name, if there is one."""
    return next((release for release in RELEASES if release.name == name), None)


def place(release: Release) -> Path:
    """Return where in the cache a release's file stands, or would."""
    return cache_folder() / "released" / release.file_name


def locate(source: str | Path, *, quiet: bool = False) -> Path:
    """Return the file that a source means: itself, or a released one's, fetched if need be.

    Args:
        source: a path, or a name of `names`; what exists as a file is a path.
        quiet: show no progress.

    Raises:
        UserError: it is a word that names neither a file nor a release, or cannot be fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    release = find(str(source))
    if release:
        return fetch(release, quiet=quiet)
    if path.suffix or path.name != str(source):
        return path  # whoever reads it says that it is missing
    near = nearest(str(source), names(), count=len(names()))
    raise UserError(
        f"checkpoint {source}: no such file, and no released checkpoint is called so; near it: "
        f"{near}"
    )


def fetch(release: Release, *, quiet: bool = False) -> Path:
    """Return a release's file, from the cache or fetched into it, held against its checksum.

    Raises:
        UserError: it cannot be fetched or written, or is not the file that was released.
    """
    path = place(release)
    if path.is_file():
        _check_kept(release, path, quiet)
        return path
    with _locked(path, quiet):
        if not path.is_file():  # else another process has fetched it meanwhile
            _fetch(release, path, quiet)
    return path


def _fetch(release: Release, path: Path, quiet: bool) -> None:
    try:
        part = _download(release, path, quiet)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        _drop_parts(path)  # they would keep the disk full
        raise UserError(
            f"{path}: the disk is full; name another cache folder in the environment variable "
            f"{CACHE_VARIABLE}"
        ) from error
    try:
        _check(release, part, f"what {release.address} sent", quiet)
    except UserError as error:
        part.unlink()
        raise UserError(f"{error}; it was removed") from error
    part.replace(path)


# --- the checksum ---------------------------------------------------------------------------------


def _check_kept(release: Release, path: Path, quiet: bool) -> None:
    """Check a file of the cache, which the user may have put there: it is never removed."""
    try:
        _check(release, path, "the file", quiet)
    except UserError as error:
        raise UserError(f"{path}: {error}; take it away to have it fetched") from error


def _check(release: Release, path: Path, what: str, quiet: bool) -> None:
    """Hold a file against its release's checksum.

    Raises:
        UserError: it is another file.
    """
    checksum, source = release.checksum, "as published"
    note = _note(release)
    if checksum is None and note.is_file():
        checksum, source = Checksum("sha256", note.read_text("ascii").strip()), f"noted in {note}"
    if checksum is None:
        _check_unpublished(release, path, quiet)
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, checksum.algorithm).hexdigest()
    if not (checksum.digest and found.startswith(checksum.digest)):
        raise UserError(
            f"{release.name}: {what} has the {checksum.algorithm} {found}, want "
            f"{checksum.digest} ({source})"
        )


def _check_unpublished(release: Release, path: Path, quiet: bool) -> None:
    """See that a file whose checksum nobody publishes is a whole backbone, and note its own.

    Raises:
        UserError: it is not.
    """
    from convert.backbone import load_backbone

    facts = load_backbone(path, pixels=release.pixels, stride_in_1x1=release.stride_in_1x1).facts
    if facts.arch != release.arch:
        raise UserError(f"{release.name}: holds a {facts.arch}, want a {release.arch}")
    note = _note(release)
    write_text(note, f"{facts.sha256}\n")
    if not quiet:
        print(
            f"{release.name}: nobody publishes its checksum; it holds a whole {facts.arch}, and "
            f"its sha256, {facts.sha256}, is noted in {note} and wanted from now on",
            file=sys.stderr,
        )


def _note(release: Release) -> Path:
    return place(release).with_name(f"{release.file_name}.sha256")


# --- the download ---------------------------------------------------------------------------------


class _Broken(Exception):
    """A connection ended before the file did, or the server is in trouble: try again."""


@contextmanager
def _locked(path: Path, quiet: bool) -> Iterator[None]:
    """Keep other processes from fetching the same file at once.

    Raises:
        UserError: the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"cache folder {path.parent}: cannot be written ({error.strerror}); name another one "
            f"in the environment variable {CACHE_VARIABLE}"
        ) from error
    with file:
        waiting = False
        while not _take(file):
            if not (waiting or quiet):
                print(f"{path.name}: another process fetches it; waiting", file=sys.stderr)
            waiting = True
            time.sleep(0.1)
        yield  # closing the file ends the lock; the file stays, for others may be waiting at it


def _take(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _download(release: Release, path: Path, quiet: bool) -> Path:
    """Fetch a file, going on where a broken connection or an earlier run left it.

    Returns:
        The whole file, beside its place.

    Raises:
        UserError: it cannot be fetched.
        OSError: it cannot be written.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            time.sleep(0.2 * attempt)
            return _receive(release, path, quiet)
        except _Broken as error:
            reason = str(error)
        except _Refused as error:
            reason = str(error)
            break
    kept = "; what came is kept to go on from" if _find_part(path) else ""
    raise UserError(
        f"{release.name}: cannot be fetched from {release.address} ({reason}){kept}; try again, or "
        f"put the file at {path}, where it is found"
    )


class _Refused(Exception):
    """There is no connection, or no such file: trying again at once would not help."""


def _receive(release: Release, path: Path, quiet: bool) -> Path:
    """Fetch what is missing of a file, in one connection.

    What there is already stands in a file whose name tells the whole's size, so that a file that
    has another size by now is begun anew.
    """
    if release.checksum is None:  # nothing would tell two halves of two versions from a whole
        _drop_parts(path)
    part = _find_part(path)
    done = part.stat().st_size if part else 0
    if part and part == _part(path, done):
        return part
    with _ask(release.address, done) as response:
        chunks = _chunks(response)
        first = next(chunks, b"")
        start, total = _span(response)
        _refuse_page(response, first if start == 0 else b"")
        if start != done or part != _part(path, total):
            _drop_parts(path)
            if start:
                raise _Broken("the file there is not the one that was begun here")
            done = 0  # the server knows no ranges, or there was no part
        part = _part(path, total)
        with part.open("ab") as file, _bar(release, total, done, quiet) as bar:
            for chunk in itertools.chain([first], chunks):
                file.write(chunk)
                done += len(chunk)
                bar.add(done // MEGABYTE - bar.done)
    if total and done != total:
        raise _Broken(f"the connection ended after {done} of {total} bytes")
    return part


def _ask(address: str, done: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "moco-transfer"} | ({"Range": f"bytes={done}-"} if done else {})
    request = urllib.request.Request(address, headers=headers)
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"the server answers {error.code} {error.reason}"
        if error.code == RANGE_NOT_SATISFIABLE:
            return _ask(address, 0)
        raise (_Broken if error.code >= 500 else _Refused)(reason) from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise _Refused(f"{reason}: is this machine offline?") from error


def _span(response: http.client.HTTPResponse) -> tuple[int, int]:
    """Return where in the file an answer begins, and the whole's size, or 0 if it is not said."""
    if response.status != PARTIAL:
        return 0, int(response.headers.get("Content-Length", 0))
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if span is None:
        raise _Refused("the server sends a part of the file and does not say which")
    return int(span[1]), int(span[2])


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(f"the connection broke, {error or type(error).__name__}") from error
        if not chunk:
            return
        yield chunk


def _refuse_page(response: http.client.HTTPResponse, first: bytes) -> None:
    kind = response.headers.get_content_type()
    if kind == "text/html" or first.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise _Refused("the answer is a web page: a sign-in of this network, or a moved file")


def _bar(release: Release, total: int, done: int, quiet: bool) -> Progress:
    sizes = total // MEGABYTE, done // MEGABYTE
    return Progress(sizes[0], f"fetching {release.name}", "megabyte", sizes[1], quiet=quiet)


def _part(path: Path, total: int) -> Path:
    return path.with_name(f"{path.name}.{total}.part")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.*.part"))


def _find_part(path: Path) -> Path | None:
    return next((part for part in _parts(path) if part != _part(path, 0)), None)


def _drop_parts(path: Path) -> None:
    for part in _parts(path):
        part.unlink(missing_ok=True)
