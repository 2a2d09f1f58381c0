"""Checkpoint files, read without running their code and without more memory than they need.

A file is known by its first bytes, whatever it is called: torch.save's zip and its older form,
plain pickles, safetensors, and each of them below gzip. Pickles are programs. torch's
`weights_only` reader goes first; where it refuses (an argparse Namespace, a Path, NumPy scalars
beside the weights) a second one builds tensors, arrays and containers, and puts an inert
`Placeholder` where any other class stood.
"""

import codecs
import collections
import errno
import gzip
import io
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.errors import UserError

OLDEST_TORCH = (2, 10)
# Weights hardly compress; what grows more than this was made to fill a memory.
MOST_GROWTH = 20
SMALL = 1 << 26  # bytes; below it growth does no harm
LONGEST_HEADER = 100 << 20  # bytes, as safetensors itself limits it
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # begins torch.save's older form


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        values: dictionaries, lists, numbers, strings, tensors, and placeholders for the rest.
        metadata: the words that safetensors keep beside their tensors.
    """

    values: Any
    metadata: dict[str, str] = field(default_factory=dict)


class Placeholder:
    """Stands where an object of some other class stood: it takes everything and does nothing.

    Attributes:
        origin: the class or function that the pickle asked for.
    """

    origin = "unknown"

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        """Make one from whatever arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _ignore(self, *_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


def read_file(path: Path) -> Content:
    """Read a checkpoint file of any supported kind.

    Raises:
        UserError: it is missing, no checkpoint, damaged, or would grow beyond all measure.
    """
    check_file(path)
    _check_torch()
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"\x1f\x8b"):
        with _unpacked(path) as inner:
            return _read(inner, f"checkpoint {path} (unpacked)", mapped=False)
    return _read(path, f"checkpoint {path}", mapped=True)


def check_file(path: Path) -> None:
    """Say in one line what is wrong with a checkpoint's path, before anything reads it.

    Raises:
        UserError: there is no file, or not one to read.
    """
    try:
        if path.is_dir():
            raise UserError(f"checkpoint {path}: is a folder; name the file in it")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: no such file") from error
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror})") from error
    if empty:
        raise UserError(f"checkpoint {path}: is empty; fetch it again")


def short(error: BaseException) -> str:
    """Return the first sentence of an error, without what torch.load appends to it."""
    text = str(error).split("\n", 1)[0].split(". ", 1)[0]
    return f"{type(error).__name__}: {text[:160]}"


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__}: reads files with known holes (CVE-2025-32434, "
            "CVE-2026-24747); want 2.10 or newer: pip install -U torch torchvision"
        )


def _read(path: Path, where: str, *, mapped: bool) -> Content:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path, where)
        return Content(_read_torch(path, where, mapped=mapped))
    if head.startswith(_LEGACY_MAGIC):
        return Content(_read_torch(path, where, mapped=False))
    if head[8:9] == b"{":
        return _read_safetensors(path, where, head)
    _refuse_others(path, where, head)
    return Content(_read_pickle(path, where))


def _refuse_others(path: Path, where: str, head: bytes) -> None:
    """Name what people save or download by mistake."""
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"{where}: is a web page, as a failed download leaves; fetch the file again"
        )
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{where}: is a pointer of Git LFS; fetch the file itself: git lfs pull")
    if tarfile.is_tarfile(path):
        raise UserError(
            f"{where}: is a tar archive, as torch wrote before 2018 or as folders are packed; "
            "unpack it, or save the weights anew with a current torch"
        )
    if head.startswith(b"\x89HDF"):
        raise UserError(f"{where}: is an HDF5 file; want one of torch.save, safetensors or pickle")
    if not head.startswith((b"\x80", b"(", b"}", b"c", b"]")):
        raise UserError(
            f"{where}: cannot be read: it begins with {head[:8]!r}, which no checkpoint does; "
            "want a file of torch.save, safetensors or pickle"
        )


# --- torch.save -----------------------------------------------------------------------------------


def _check_zip(path: Path, where: str) -> None:
    """Refuse what is no checkpoint, or would grow, before torch unpacks it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UserError(f"{where}: cannot be read: it is cut short ({short(error)})") from error
    names = {entry.filename.split("/", 1)[-1] for entry in entries}
    if "constants.pkl" in names:
        raise UserError(
            f"{where}: is a TorchScript program; save its weights with "
            "torch.save(model.state_dict(), ...)"
        )
    if "data.pkl" not in names:
        first = ", ".join(f"'{entry.filename}'" for entry in entries[:3])
        raise UserError(f"{where}: is a zip archive of {first or 'nothing'}, and no checkpoint")
    _check_growth(sum(entry.file_size for entry in entries), path, where)


def _check_growth(size: int, path: Path, where: str) -> None:
    packed = path.stat().st_size
    if size > max(SMALL, MOST_GROWTH * packed):
        raise UserError(
            f"{where}: would grow from {packed:,} to {size:,} bytes or more; weights do not, so it "
            "was not unpacked"
        )


def _read_torch(path: Path, where: str, *, mapped: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "mmap": mapped or None}
    try:
        try:
            return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError:
            return torch.load(
                path, weights_only=False, pickle_module=_INERT, encoding="latin1", **options
            )
    except MemoryError as error:
        raise UserError(f"{where}: does not fit into memory") from error
    except Exception as error:  # torch.load has no closed list of what a damaged file raises
        raise UserError(
            f"{where}: cannot be read ({short(error)}); it is cut short or no checkpoint"
        ) from error


# --- pickles --------------------------------------------------------------------------------------


class InertUnpickler(pickle.Unpickler):
    """Builds numbers, strings, containers, arrays and tensors; everything else is a placeholder."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the builder of that name, from a closed list, or a class of placeholders."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known = _BUILDERS.get((module.replace("numpy._core", "numpy.core"), name))
        if known is not None:
            return known
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Build a tensor on a storage that is large enough for it; torch itself would enlarge it."""
    untyped, dtype = storage._untyped_storage, storage.dtype
    size, stride = tuple(size), tuple(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage._size()):
        raise pickle.UnpicklingError(f"a tensor of {size} does not fit into its storage")
    return torch.empty(0, dtype=dtype).set_(untyped, offset, size, stride)


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _load_bytes(data: bytes) -> Any:
    """Read a storage that a plain pickle holds as a file of torch.save's older form."""
    if not data.startswith(_LEGACY_MAGIC):
        raise pickle.UnpicklingError("a storage that torch did not write")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _rebuild_array(kind: Any, shape: tuple[int, ...], code: Any) -> np.ndarray:
    """Begin an array, empty, as NumPy's pickles do; its state brings shape and values."""
    return np.empty(0, np.uint8)


def _scalar(dtype: np.dtype, data: Any = b"") -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype)[0] if isinstance(raw, bytes) and not dtype.hasobject else None


def _from_buffer(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if dtype.hasobject:
        raise pickle.UnpicklingError("an array of Python objects")
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]


def _encode(text: str, codec: str = "latin1") -> bytes:
    """Undo how Python 3 writes bytes into old pickles; other codecs could be anything."""
    if codecs.lookup(codec).name != "iso8859-1":
        raise pickle.UnpicklingError(f"bytes in {codec}")
    return text.encode("latin1")


def _default_dict(*_: Any) -> collections.defaultdict:
    return collections.defaultdict()


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _default_dict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _load_bytes,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _rebuild_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in (("set", set), ("frozenset", frozenset), ("complex", complex))
    },
}


def _load_inert(file: Any, **options: Any) -> Any:
    return InertUnpickler(file, **options).load()


# What torch.load wants of a `pickle_module`.
_INERT = SimpleNamespace(__name__="inert", Unpickler=InertUnpickler, load=_load_inert)


def _read_pickle(path: Path, where: str) -> Any:
    try:
        with path.open("rb") as file:
            return _load_inert(file, encoding="latin1")  # Python 2 wrote arrays as such strings
    except MemoryError as error:
        raise UserError(f"{where}: does not fit into memory") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(
            f"{where}: cannot be read ({short(error)}); it is cut short or no checkpoint"
        ) from error


# --- safetensors and gzip -------------------------------------------------------------------------


def _read_safetensors(path: Path, where: str, head: bytes) -> Content:
    import safetensors

    length = int.from_bytes(head[:8], "little")
    if length > min(LONGEST_HEADER, path.stat().st_size - 8):
        raise UserError(
            f"{where}: its header claims {length:,} bytes, of a file of {path.stat().st_size:,}; "
            "it is cut short or no safetensors file"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Content(tensors, file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{where}: cannot be read ({short(error)}); it is cut short or no safetensors file"
        ) from error


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Unpack a gzip file beside all memory, and stop when it grows as weights never do."""
    with tempfile.NamedTemporaryFile(prefix="moco-transfer-") as plain:
        try:
            with gzip.open(path) as packed:
                while block := packed.read(1 << 20):
                    plain.write(block)
                    _check_growth(plain.tell(), path, f"checkpoint {path}")
            plain.flush()
        except (EOFError, gzip.BadGzipFile, ValueError) as error:
            raise UserError(
                f"checkpoint {path}: cannot be read ({short(error)}); it is cut short"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{plain.name}: the disk is full; cannot unpack {path}") from error
        yield Path(plain.name)
