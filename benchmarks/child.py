"""One script of ours, run by another to its end."""

import subprocess
import sys

from convert.errors import Stopped, UserError
from convert.files import ROOT


def run(script: str, words: list[str], *, quiet: bool) -> None:
    """Run a script, its lines going where ours go; asked to stop, let it save first.

    Args:
        script: its path in the repository.
        words: its command line.
        quiet: hand `--quiet` on.

    Raises:
        UserError: it failed; its own line, above ours, says why.
        Stopped: a signal came, and the script has ended.
    """
    command = [sys.executable, str(ROOT / script), *words, *(["--quiet"] if quiet else [])]
    child = subprocess.Popen(command)
    try:
        status = child.wait()
    except Stopped:
        child.terminate()
        child.wait()
        raise
    if status:
        raise UserError(f"{script} ended with status {status}; mend that and type this again")
