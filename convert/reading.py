"""Checkpoint files, read without running their code and without more memory than they need.

A file is known by its first bytes, whatever it is called: torch.save's zip and its older form,
plain pickles, safetensors, and each of them below gzip. Pickles are programs. torch's
`weights_only` reader goes first; where it refuses (an argparse Namespace, a Path, NumPy scalars
beside the weights) a second one builds tensors, arrays and containers, and puts an inert
`Placeholder` where any other class stood.
"""

import codecs
import errno
import gzip
import io
import pickle
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

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

    __setitem__ = append = extend = add = update = _ignore


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
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"checkpoint {path}: is a folder; name the file in it")
        if not stat.S_ISREG(mode):
            raise UserError(f"checkpoint {path}: is a device or a pipe; want a file")
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
        stored = _check_zip(path, where)
        return Content(_read_torch(path, where, mapped=mapped and stored))
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
    if head[257:262] == b"ustar":
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


def _check_zip(path: Path, where: str) -> bool:
    """Refuse what is no checkpoint, or would grow, before torch unpacks it.

    Returns:
        Whether nothing in it is compressed, so that it can be mapped.
    """
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
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


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


_PureUnpickler: Any = pickle._Unpickler  # C's memo is an array, as long as a pickle says


class InertUnpickler(_PureUnpickler):
    """Builds numbers, strings, containers, arrays and tensors; everything else is a placeholder.

    What a pickle may call is one of the builders below, and what it may change afterwards (BUILD)
    is an array, its type or a dictionary of ours: NumPy's and torch's own objects trust a state
    that they are given.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PureUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return the builder of that name, from a closed list, or a class of placeholders."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known = _BUILDERS.get((module.replace("numpy._core", "numpy.core"), name))
        if known is not None:
            return known
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def load_build(self) -> None:
        """Hand a state to an object that checks it; any other object goes without."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], (PickledArray, _Type, _Ordered)):
            self.stack[-1].take(state)

    dispatch[pickle.BUILD[0]] = load_build

    def __setattr__(self, name: str, value: Any) -> None:
        """Let torch's loader give storages; its older form would write source files beside."""
        super().__setattr__(name, _storages_only(value) if name == "persistent_load" else value)


def _storages_only(load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def persistent_load(saved: Any) -> Any:
        if not isinstance(saved, tuple) or not saved or saved[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return load(saved)

    return persistent_load


class _Ordered(dict[Any, Any]):
    """An OrderedDict that keeps the one attribute that state dicts have."""

    __slots__ = ("_metadata",)

    def take(self, state: Any) -> None:
        if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
            self._metadata = state["_metadata"]


class _Type:
    """A NumPy type of numbers or characters; `plain` is None for any other, as of objects."""

    __slots__ = ("plain",)

    def __init__(self, code: Any, *_: Any) -> None:
        known = isinstance(code, str) and re.fullmatch(
            r"[<>|=]?[?bBhHiIlLqQefdgFD]|[biufcSU]\d+", code
        )
        self.plain: np.dtype | None = np.dtype(code) if known else None

    def take(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        rest = [part for part in state[2:5] if part is not None] if order else [state]
        if self.plain is not None and order in ("<", ">", "=", "|") and not rest:
            self.plain = self.plain.newbyteorder(order)
        else:
            self.plain = None


class PickledArray:
    """A NumPy array in a pickle.

    Attributes:
        array: its values; empty where they are not plain numbers or characters.
    """

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0, np.uint8)

    def take(self, state: Any) -> None:
        """Take the shape and the values that NumPy wrote, if they fit each other."""
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type) or kind.plain is None:
            return
        raw = data.encode("latin1") if isinstance(data, str) else data
        if isinstance(raw, bytes):
            order: Any = "F" if fortran else "C"
            self.array = np.frombuffer(raw, kind.plain).reshape(shape, order=order)

    def __array__(self, *options: Any, **named: Any) -> np.ndarray:
        """Return the values, as NumPy asks for them."""
        return np.asarray(self.array, *options)


def _sealed(build: Callable[..., Any]) -> Any:
    """Wrap a builder so that a pickle can call it, and do nothing else with it."""

    class Builder:
        __slots__ = ()

        def __call__(self, *arguments: Any) -> Any:
            return build(*arguments)

    return Builder()


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Build a tensor on a storage that is large enough for it; torch itself would enlarge it."""
    untyped, dtype = storage._untyped_storage, storage.dtype
    size, stride = tuple(size), tuple(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held = untyped.nbytes() // dtype.itemsize
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= held):
        raise pickle.UnpicklingError(f"a tensor of {size} does not fit into its storage")
    return torch.empty(0, dtype=dtype).set_(untyped, offset, size, stride)


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _rebuild_with_attributes(build: Any, kind: Any, arguments: Any, state: Any) -> Any:
    return build(*arguments)


def _load_bytes(data: bytes) -> Any:
    """Read a storage that a plain pickle holds as a file of torch.save's older form."""
    if not data.startswith(_LEGACY_MAGIC):
        raise pickle.UnpicklingError("a storage that torch did not write")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _scalar(kind: Any, data: Any = b"") -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    plain = kind.plain if isinstance(kind, _Type) else None
    return None if plain is None or not isinstance(raw, bytes) else np.frombuffer(raw, plain)[0]


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> PickledArray:
    found = PickledArray()
    found.take((1, shape, kind, order == "F", bytes(data)))
    return found


def _encode(text: str, codec: str = "latin1") -> bytes:
    """Undo how Python 3 writes bytes into old pickles; other codecs could be anything."""
    if codecs.lookup(codec).name != "iso8859-1":
        raise pickle.UnpicklingError(f"bytes in {codec}")
    return text.encode("latin1")


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


_BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _sealed(_Ordered),
    ("collections", "defaultdict"): _sealed(_default_dict),
    ("torch", "Size"): _sealed(tuple),
    ("torch._utils", "_rebuild_tensor"): _sealed(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _sealed(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _sealed(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _sealed(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _sealed(_rebuild_with_attributes),
    ("torch.storage", "_load_from_bytes"): _sealed(_load_bytes),
    ("numpy", "dtype"): _sealed(_Type),
    ("numpy.core.multiarray", "_reconstruct"): _sealed(PickledArray),
    ("numpy.core.multiarray", "scalar"): _sealed(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _sealed(_from_buffer),
    ("_codecs", "encode"): _sealed(_encode),
    **{
        (module, name): _sealed(kind)
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
