"""Files that are whole or absent, and what a result must say about where it came from."""

import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from convert import __version__
from convert.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CACHE_VARIABLE = "MOCO_TRANSFER_CACHE"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` only if the block succeeds.

    Raises:
        UserError: the folder cannot be written, the disk is full, or a folder or a device stands
            in the file's place.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file that could be replaced; name another output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write here ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner reads
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{path}: the disk is full; nothing was written") from error
        if error.errno in {errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}:
            raise UserError(f"{path}: {error.strerror}; nothing was written") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def output_folder(path: Path) -> Path:
    """Make an output folder and prove that it can be written.

    Raises:
        UserError: it exists as a file, or cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"output folder {path}: cannot be written ({reason}); choose another with --output-dir"
        ) from error
    return path


def cache_folder() -> Path:
    """Return the user's cache folder for this project, which need not exist yet.

    Raises:
        UserError: there is no home folder and no variable names a cache.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG specification says to ignore a relative one
        return shared / "moco-transfer"
    try:
        return Path.home() / ".cache" / "moco-transfer"
    except RuntimeError as error:
        raise UserError(
            f"cache folder: there is no home folder; name one in the variable {CACHE_VARIABLE}"
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Say what a number was measured with: versions, hardware, commit of this checkout."""
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "pycocotools", "Pillow")
    versions = {name: _version(name) for name in packages}
    return {
        "moco_transfer": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions | {"detectron2": detectron2_version()},
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": _gpus()},
        "platform": platform.platform(),
    }


def detectron2_version() -> str | None:
    """Say which Detectron2 is installed, without importing it; None where there is none."""
    for distribution in ("detectron2", "sal-detectron2"):
        version = _version(distribution)
        if version:
            return f"{distribution} {version}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # whoever used a GPU has imported it
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
