import subprocess
import sys
import time

import pytest

from convert.errors import Parser, UserError, nearest
from tests.conftest import ROOT


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = "from convert.errors import *\nimport os, signal, sys, time\nsys.argv = ['x.py']\n"
    code += f"def main(argv):\n    {body}\nrun_script(main)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("return 0", 0, ""),
        ("raise UserError('there:\\n  found a, wanted b')", 2, "x.py: there: found a, wanted b\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "x.py: stopped by SIGINT\n"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, "x.py: stopped by SIGTERM\n"),
    ],
)
def test_every_outcome_has_its_status_and_line(body, status, line):
    done = run(body)
    assert (done.returncode, done.stderr) == (status, line)


def test_our_own_bug_keeps_its_traceback():
    done = run("return 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_reader_that_leaves_is_no_error():
    code = "from convert.errors import run_script\n"
    code += "run_script(lambda argv: [print(i) for i in range(100000)] and 0)"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}' | head -n 1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


def test_a_stop_request_waits_for_the_loop():
    body = "with StopRequest() as stop:\n        os.kill(os.getpid(), signal.SIGINT)\n"
    body += "        print('saved', stop.signum)\n    return 0"
    done = run(body)
    assert (done.returncode, done.stdout) == (0, "saved 2\n")


def test_a_wrong_flag_is_one_line():
    with pytest.raises(UserError, match=r"unrecognized arguments: --colour; see .* --help"):
        Parser("a script").parse_args(["--colour"])


def test_the_nearest_words_are_named():
    assert nearest("epoch", ["lr", "epochs", "K"]) == "epochs"
    assert nearest("zzz", ["b", "a"]) == "a, b"


def test_importing_errors_is_quick():
    started = time.monotonic()
    run("return 0")
    assert time.monotonic() - started < 1
