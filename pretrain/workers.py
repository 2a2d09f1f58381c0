"""Processes that load images: which signals end them, and what their loss does to a run."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from convert.errors import UserError

NO_ROOM = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def load(
    items: Dataset[Any],
    places: Iterable[Sequence[Any]],
    workers: int,
    collate: Callable[[list[Any]], Any],
    *,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Yield batches in the order of their places, loaded by processes of this one.

    Args:
        items: what can be loaded, by place.
        places: the places of each batch.
        workers: processes; 0 loads in this one.
        collate: makes a batch of its items.
        pin_memory: hand batches over in pinned memory.

    Raises:
        UserError: a process that loads was ended from outside.
    """
    with watched(workers):
        loader: DataLoader[Any] = DataLoader(
            items,
            batch_sampler=places,  # type: ignore[arg-type]  # places may be of any kind
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            worker_init_fn=_heed_the_parent_alone,
            generator=torch.Generator(),  # else one number of the main process's is drawn
        )
        try:
            yield from loader
        except (EOFError, ConnectionError) as error:  # it went while it handed a batch over
            if not workers:
                raise
            time.sleep(1)  # the system's word of its end, which torch turns into an error, is late
            raise RuntimeError("DataLoader worker exited unexpectedly.") from error


@contextmanager
def watched(workers: int) -> Iterator[None]:
    """Say in one line that a loading process was lost, or could not be started.

    The loss is heard of anywhere: torch raises its error where the main thread then is.

    Args:
        workers: processes that load, for the line.

    Raises:
        UserError: a process was lost, or the system refused to start so many.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that loads images ended: {_told(error)} With Killed or Bus error memory "
            f"ran out: {_too_many(workers)}"
        ) from error
    except OSError as error:
        if not workers or error.errno not in NO_ROOM:
            raise
        raise UserError(f"the system refused ({error.strerror}): {_too_many(workers)}") from error


def _told(error: BaseException) -> str:
    """Return what is known of a process's end: its signal, if torch came to hear of it."""
    lines = []
    cause: BaseException | None = error
    while cause is not None:
        lines.append(str(cause).partition("\n")[0].strip())
        cause = cause.__cause__ or cause.__context__
    return next((line for line in lines if "by signal" in line), lines[0])


def _too_many(workers: int) -> str:
    return f"{workers} workers are more than this machine holds; lower --workers"


def _heed_the_parent_alone(worker: int) -> None:
    """Let no signal end this process but its parent's SIGTERM.

    A terminal's Ctrl-C and a launcher's SIGTERM reach every process of a run; the parent alone
    decides when loading ends, after a last checkpoint perhaps. Who sent a signal is told to
    sigwaitinfo only, so a thread waits for it.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent and parent.pid):
        pass
    os._exit(0)
