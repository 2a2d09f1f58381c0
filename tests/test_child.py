import os
import signal
import threading
import time

import pytest

from benchmarks import child
from convert.errors import Stopped, UserError

SAVES = """
import signal, sys, time
from pathlib import Path
def save(signum, frame):
    time.sleep(0.5)
    Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


def test_a_script_that_is_stopped_saves_before_we_end(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "ROOT", tmp_path)
    (tmp_path / "saves.py").write_text(SAVES)
    state = tmp_path / "state"

    def stop_when_started():
        while not state.exists() or state.read_text() != "started":
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(signum, frame):
        raise Stopped(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        threading.Thread(target=stop_when_started).start()
        with pytest.raises(Stopped):
            child.run("saves.py", [str(state)], quiet=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert state.read_text() == "saved"


def test_a_script_that_fails_is_named_with_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "ROOT", tmp_path)
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(2 if '--quiet' in sys.argv else 0)")
    child.run("fails.py", [], quiet=False)
    with pytest.raises(UserError, match=r"fails\.py ended with status 2; mend that and type this"):
        child.run("fails.py", [], quiet=True)
