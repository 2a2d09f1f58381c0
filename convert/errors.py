"""One-line errors, exit status and signals: what every script shares.

Exit status: 0 done; 2 the user can mend it, one line says how; 1 our bug, with its traceback;
128 + n ended by signal n (Ctrl-C: 130, SIGTERM: 143).
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from convert import __version__


class UserError(Exception):
    """Something the user can mend.

    The message is one line: where, what was found, what was wanted, what to do.
    """


class Stopped(BaseException):
    """A signal asked this process to end; whoever has something to save catches it first."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status that a shell expects: 128 + the signal's number."""
        return 128 + self.signum


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help keeps its examples as typed."""

    def __init__(self, description: str, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(description=description, **options)  # type: ignore[arg-type]
        self.add_argument("--version", action="version", version=f"MoCo Transfer {__version__}")
        self.add_argument("--quiet", action="store_true", help="print results and errors only")

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as a `UserError`, so that it looks like every other one."""
        raise UserError(f"{message}; see {self.prog} --help")


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Name the known words nearest to a mistyped one, for an error line."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.5)
    return ", ".join(close or sorted(known))


def run_script(main: Callable[[list[str] | None], int]) -> NoReturn:
    """Run a script's `main` and end the process with the status that its outcome deserves.

    Args:
        main: takes the command line (None: `sys.argv`) and returns an exit status.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    name = Path(sys.argv[0]).name
    try:
        status = main(None)
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        status = 2
    except Stopped as stop:
        print(f"{name}: stopped by {signal.Signals(stop.signum).name}", file=sys.stderr)
        status = stop.status
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _one_line(error: UserError) -> str:
    # A DataLoader hands an error of its workers on with their traceback around the message.
    return printable(" ".join(str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].split()))


def printable(text: str) -> str:
    """Replace what a terminal would obey, as names inside a file may hold it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    # A second Ctrl-C while saving must not cut the save: only the first one raises.
    signal.signal(signum, signal.SIG_IGN)
    raise Stopped(signum)


class StopRequest:
    """Turns signals into a note that a loop reads between two steps, where saving is safe."""

    def __init__(self, signums: Iterable[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.signum: int | None = None
        self._before = {signum: signal.getsignal(signum) for signum in signums}

    def __enter__(self) -> "StopRequest":
        for signum in self._before:
            signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
