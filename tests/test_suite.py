import contextlib
import errno
import json
import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks import jobs
from benchmarks.board import Quiet
from benchmarks.jobs import SUITES, plan, resolve
from benchmarks.local import Local
from benchmarks.runner import Runner, alive
from benchmarks.suite import main
from benchmarks.templates import load_suite
from convert.errors import UserError
from convert.files import ROOT

SUITE = ROOT / "benchmarks/suite.py"

# A job: notes when it starts and ends, copies what it reads; can wait, fail, save on a signal.
WORK = """
import json, os, signal, sys, time
from pathlib import Path

out, *words = sys.argv[1:]
out = Path(out)
options = dict(word.split("=", 1) for word in words if "=" in word)
notes = out.parent / "notes.txt"

def note(what):
    threads = os.environ["OMP_NUM_THREADS"]
    with notes.open("a") as file:
        file.write(f"{what} {out.name} {time.time()} {os.getpid()} {threads}\\n")

def save(signum, frame):
    with (out / "signals").open("a") as file:
        file.write(f"{signum} ")
    time.sleep(0.3)
    (out / "saved").touch()
    sys.exit(128 + signum)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
note("start")
with (out / "attempts").open("a") as file:
    file.write("x")
text = "".join(Path(word).read_text() for word in words if Path(word).is_file())
if options.get("until"):
    print("step 3/4 waiting", flush=True)
    while not Path(options["until"]).exists():
        time.sleep(0.02)
time.sleep(float(options.get("seconds", 0)))
for number in range(int(options.get("lines", 1))):
    print("line", number)
if "status" in options:
    sys.exit(int(options["status"]))
(out / "made.txt").write_text(text + out.name)
note("end")
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def work(tmp_path: Path) -> str:
    script = tmp_path / "a script.py"
    script.write_text(WORK)
    return f"python {shlex.quote(str(script))} {{output}}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out [1]"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(jobs: dict, parallel: int = 2, **more: object) -> Path:
        path = tmp_path / "tiny.yaml"
        content = {"parallel": parallel, **more, "jobs": jobs}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, out: Path) -> Run:
    def run(suite: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(suite, out, *words), **PIPES, cwd=tmp_path, timeout=60)

    return run


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def command(suite: Path, out: Path, *words: str) -> list[str]:
    return [sys.executable, str(SUITE), *words, "--suite", str(suite), "--output-dir", str(out)]


def notes(out: Path) -> list[list[str]]:
    file = out / "notes.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def started(out: Path) -> list[str]:
    return [words[1] for words in notes(out) if words[0] == "start"]


def states(out: Path) -> dict[str, str]:
    jobs = json.loads((out / "suite.json").read_text())["jobs"]
    return {job["name"]: job["state"] for job in jobs}


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def chain(work: str) -> dict:
    return {
        "first": {"command": work, "makes": {"text": "made.*"}},
        "second": {"command": f"{work} {{text}}", "makes": {"more": "made.txt"}},
        "third": {"command": f"{work} {{text}} {{more}}"},
    }


def test_a_finished_job_is_never_run_twice(work, write, run, out):
    suite = write(chain(work))
    first = run(suite)
    assert first.returncode == 0, first.stderr
    assert started(out) == ["first", "second", "third"]
    second = run(suite)
    assert second.returncode == 0
    assert started(out) == ["first", "second", "third"]
    assert set(states(out).values()) == {"reused"}
    assert second.stdout.splitlines()[-1] == f"report: {out}/report.html"
    assert (out / "report.html").is_file()


def test_jobs_get_the_files_that_others_made(work, write, run, out):
    run(write(chain(work)))
    assert (out / "third/made.txt").read_text() == "firstfirstsecondthird"


def test_order_holds_and_two_run_at_once_but_never_three(work, write, run, out):
    slow = f"{work} seconds=0.5"
    jobs = {"last": {"command": f"{slow} {{a}} {{b}} {{c}}"}}
    jobs |= {name: {"command": slow, "makes": {name: "made.txt"}} for name in "abc"}
    assert run(write(jobs, parallel=2)).returncode == 0
    events = [words[:2] for words in sorted(notes(out), key=lambda words: float(words[2]))]
    assert events[-2:] == [["start", "last"], ["end", "last"]]
    running, most = 0, 0
    for what, _ in events:
        running += 1 if what == "start" else -1
        most = max(most, running)
    assert most == 2


def test_cores_are_divided_among_the_jobs(work, write, run, out, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run(write({"one": {"command": work}}, parallel=2)).returncode == 0
    assert notes(out)[0][-1] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(write({"two": {"command": work}})).returncode == 0
    assert notes(out)[-1][-1] == "7"


@pytest.mark.long
def test_a_changed_base_recipe_runs_its_job_and_those_behind_it_again(
    work, write, run, out, tmp_path
):
    (tmp_path / "base.yaml").write_text("a: 1\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("_BASE_: [base.yaml]\nb: 1\n")
    jobs = chain(work)
    jobs["second"]["command"] += f" {shlex.quote(str(recipe))}"
    jobs["other"] = {"command": work}
    suite = write(jobs)
    run(suite)
    assert set(states(out).values()) == {"done"}
    (tmp_path / "base.yaml").write_text("a: 2\n")
    done = run(suite)
    wanted = {"first": "reused", "second": "done", "third": "done", "other": "reused"}
    assert states(out) == wanted
    assert "second: its inputs changed" in done.stdout
    assert (out / "replaced/second/made.txt").is_file()
    assert (out / "second/attempts").read_text() == "x"


def test_a_checkpoint_replaces_the_job_that_makes_it_and_counts_by_content(
    work, write, run, out, tmp_path
):
    jobs = {
        "make": {"command": work, "makes": {"checkpoint": "made.txt"}},
        "use": {"command": f"{work} {{checkpoint}}"},
    }
    suite = write(jobs)
    checkpoint = tmp_path / "mine.pth"
    checkpoint.write_text("one ")
    for text, times in (("one ", 1), ("one ", 1), ("two ", 2)):
        checkpoint.write_text(text)
        assert run(suite, str(checkpoint)).returncode == 0
        assert started(out) == ["use"] * times
        assert (out / "use/made.txt").read_text() == f"{text}use"


def test_a_file_that_was_removed_is_made_again(work, write, run, out):
    suite = write(chain(work))
    run(suite)
    (out / "first/made.txt").unlink()
    assert run(suite).returncode == 0
    assert states(out) == {"first": "done", "second": "reused", "third": "reused"}


@pytest.mark.parametrize(("child", "status"), [(1, 1), (2, 2), (77, 1)])
def test_a_failure_shows_its_log_and_stops_only_what_needs_it(work, write, run, out, child, status):
    jobs = chain(work)
    jobs["first"]["command"] += f" lines=30 status={child}"
    jobs["other"] = {"command": work}
    done = run(write(jobs))
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "line 29" in done.stdout
    assert "line 15" in done.stdout
    assert "line 14" not in done.stdout
    wanted = {"first": "failed", "second": "skipped", "third": "skipped", "other": "done"}
    assert states(out) == wanted
    assert done.stdout.splitlines()[-1] == f"report: {out}/report.html"
    page = (out / "report.html").read_text()
    assert f"not run: first: failed (status {child}: line 29)" in page
    assert "not run: second: skipped (needs first, which failed)" in page
    assert started(out).count("first") == (1 if child == 2 else 2)  # 2: its user can mend it


def test_a_failed_job_is_tried_again_by_the_next_call(work, write, run, out, tmp_path):
    gate = tmp_path / "gate"
    script = tmp_path / "gated.py"
    script.write_text(f"import sys, pathlib; sys.exit(not pathlib.Path({str(gate)!r}).exists())")
    suite = write({"gated": {"command": f"python {shlex.quote(str(script))}"}})
    assert run(suite).returncode == 1
    gate.touch()
    assert run(suite).returncode == 0
    assert states(out) == {"gated": "done"}


def test_a_failed_job_is_tried_once_more_in_the_same_call(write, run, out, tmp_path):
    script = tmp_path / "flaky.py"
    script.write_text(
        "import json, sys, pathlib; seen = pathlib.Path(sys.argv[1]); bad = not seen.exists();"
        "record = pathlib.Path(sys.argv[2]) / '../jobs/flaky.json';"
        "assert json.loads(record.read_text())['reason'] == '';"  # an earlier attempt's is over
        "seen.touch(); print('out of luck'); sys.exit(bad)"
    )
    suite = write(
        {"flaky": {"command": f"python {shlex.quote(str(script))} {tmp_path}/seen {{output}}"}}
    )
    done = run(suite)
    assert done.returncode == 0
    assert "retry   flaky: status 1: out of luck; it is tried once more" in done.stdout
    assert states(out) == {"flaky": "done"}
    assert json.loads((out / "suite.json").read_text())["jobs"][0]["attempts"] == 2


def results(out: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in out.glob("*/made.txt")}


def test_kill_9_at_any_moment_ends_in_the_same_table_and_nothing_done_runs_again(
    work, write, out, tmp_path
):
    jobs = {
        f"a{i}": {"command": f"{work} seconds=0.2", "makes": {f"a{i}": "made.txt"}} for i in "12"
    }
    jobs |= {f"b{i}": {"command": f"{work} {{a{i}}} --resume seconds=0.2"} for i in "12"}
    suite = write(jobs)
    draw = random.Random(7)
    whole = tmp_path / "whole"
    subprocess.run(command(suite, whole, "--quiet"), **PIPES, check=True)

    def done() -> list[str]:
        records = [json.loads(file.read_text()) for file in out.glob("jobs/*.json")]
        return [record["name"] for record in records if record["state"] == "done"]

    for victim in ("suite", "job", "suite", "job", "suite"):
        before, finished = started(out), done()
        process = subprocess.Popen(command(suite, out), **PIPES)
        wait_for(lambda: len(started(out)) > len(before) or process.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0, 0.4))
        if victim == "suite":
            process.kill()
        elif len(started(out)) > len(before):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int([words for words in notes(out) if words[0] == "start"][-1][3]), 9)
        process.communicate(timeout=30)
        assert not set(finished) & set(started(out)[len(before) :])
    last = subprocess.run(command(suite, out), **PIPES, timeout=60)
    assert last.returncode == 0, last.stdout
    assert results(out) == results(whole) != {}
    table = [json.loads((folder / "report.json").read_text())["rows"] for folder in (out, whole)]
    assert table[0] == table[1]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(work, write, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)]
    try:
        subprocess.run(probe, **PIPES, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a small disk (unshare -rm mount)")
    script = tmp_path / "fill.py"
    script.write_text(
        "import contextlib, pathlib, sys; file = pathlib.Path(sys.argv[1]); big = bytes(1 << 23)\n"
        "with contextlib.suppress(OSError): file.exists() or file.write_bytes(big)"
    )
    suite = write({"fill": {"command": f"python {script} {disk}/filler"}, "b": {"command": work}})
    call = shlex.join([*command(suite, disk / "out"), "--quiet"])
    after = f"echo $? > {tmp_path}/status; : > {disk}/filler; {call}"
    words = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f"mount -t tmpfs -o size=4m none {disk}; {call}; {after}",
    ]
    done = subprocess.run(words, **PIPES, timeout=60)
    assert (tmp_path / "status").read_text() == "2\n"
    assert "the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 0
    assert done.stdout == f"report: {disk}/out/report.html\n"


@pytest.fixture
def sets(tmp_path: Path) -> dict:
    """A set of a suite's own, there, and the job that reads it."""
    (tmp_path / "flowers/train").mkdir(parents=True)
    (tmp_path / "flowers/list.txt").write_text("rose")
    return {"flowers": {"title": "Flowers", "at": "{flowers}", "files": ["train", "list.txt"]}}


def test_what_the_data_cannot_serve_is_listed_first_and_the_rest_runs(
    work, write, run, out, tmp_path, sets
):
    jobs = {
        "wants/moco": {"command": f"{work} {{flowers}}/list.txt", "data": "flowers"},
        "free/moco": {"command": work},
    }
    suite = write(jobs, data=sets)
    done = run(suite)
    assert done.returncode == 0
    hint = "name the folder by --data flowers=PATH or FLOWERS_DIR"
    assert f"missing: Flowers: {hint}" in done.stdout
    assert done.stdout.index("missing: Flowers") < done.stdout.index("start   free/moco")
    assert states(out) == {"wants/moco": "open", "free/moco": "done"}
    assert started(out / "free") == ["moco"]
    dry = run(suite, "--dry-run", "--data", f"flowers={tmp_path}/elsewhere")
    assert (
        f"missing: Flowers: in {tmp_path}/elsewhere 2 of 2 missing: train, list.txt" in dry.stdout
    )
    assert "open: wants/moco" in dry.stdout
    again = run(suite, "--data", f"flowers={tmp_path}/flowers")
    assert again.returncode == 0, again.stdout
    assert states(out) == {"wants/moco": "done", "free/moco": "reused"}
    assert (out / "wants/moco/made.txt").read_text() == "rosemoco"
    assert set(states_after(run, suite, out).values()) == {"reused"}  # measured stays measured
    (tmp_path / "flowers/list.txt").write_text("tulips")
    run(suite, "--data", f"flowers={tmp_path}/flowers")
    assert states(out) == {"wants/moco": "done", "free/moco": "reused"}


def states_after(run: Run, suite: Path, out: Path) -> dict[str, str]:
    run(suite)
    return states(out)


def test_data_that_vanishes_in_the_middle_fails_its_jobs_with_the_reason(
    work, write, run, out, tmp_path, sets
):
    script = tmp_path / "remove.py"
    script.write_text("import shutil, sys; shutil.rmtree(sys.argv[1])")
    jobs = {
        "remove": {"command": f"python {script} {tmp_path}/flowers", "data": "flowers"},
        "reads": {"command": work, "data": "flowers"},
        "other": {"command": work},
    }
    done = run(write(jobs, parallel=1, data=sets), "--data", f"flowers={tmp_path}/flowers")
    assert done.returncode == 2
    assert states(out) == {"remove": "done", "reads": "failed", "other": "done"}
    assert f"Flowers: in {tmp_path}/flowers 2 of 2 missing: train, list.txt" in done.stdout
    assert "reads" not in started(out)


def test_nothing_that_can_run_is_one_line(work, write, run, out, sets):
    done = run(write({"a": {"command": work, "data": "flowers"}}, data=sets))
    assert done.returncode == 2
    assert "nothing of it can be run here; first, a: Flowers: name the folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_override_reaches_its_jobs_and_marks_their_results(work, write, run, out):
    jobs = chain(work)
    jobs["other"] = {"command": work}
    suite = write(jobs)
    run(suite)
    assert run(suite, "--override", "sec*", "EPOCHS", "1").returncode == 0
    wanted = {"first": "reused", "second": "done", "third": "done", "other": "reused"}
    assert states(out) == wanted
    found = json.loads((out / "suite.json").read_text())["jobs"]
    assert found[1]["command"].endswith("EPOCHS 1")
    marks = {job["name"]: job.get("reduced") for job in found}
    assert marks == {
        "first": None,
        "second": {"EPOCHS": "1"},
        "third": {"EPOCHS": "1"},  # it reads what second made
        "other": None,
    }


def test_a_job_that_does_not_make_its_file_failed(work, write, run, out):
    jobs = {"liar": {"command": work, "makes": {"weights": "*.pkl"}}}
    done = run(write(jobs))
    assert done.returncode == 1
    assert "left no *.pkl" in done.stdout


def test_what_a_job_prints_can_be_its_file(write, run, out, tmp_path):
    script = tmp_path / "prints.py"
    script.write_text("import sys; print('{\"a\": 1}'); print('words', file=sys.stderr)")
    jobs = {"p": {"command": f"python {script}", "stdout": "c.json", "makes": {"c": "c.json"}}}
    assert run(write(jobs)).returncode == 0
    assert json.loads((out / "p/c.json").read_text()) == {"a": 1}
    assert (out / "jobs/p.log").read_text().endswith("words\n")


def test_a_child_killed_by_the_system_is_named(write, run, out, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = run(write({"dies": {"command": f"python {script}"}}))
    assert done.returncode == 1
    assert "ended by SIGKILL, out of memory?" in done.stdout
    assert json.loads((out / "suite.json").read_text())["jobs"][0]["status"] == 137


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_child_once_and_its_save_is_waited_for(
    work, write, out, tmp_path, signum, status
):
    suite = write({"long": {"command": f"{work} --resume until={tmp_path}/never"}})
    process = subprocess.Popen(command(suite, out), **PIPES, start_new_session=True)
    wait_for(lambda: (out / "long/attempts").exists())
    child = int(notes(out)[0][3])
    assert os.getpgid(child) == child  # a terminal's Ctrl-C goes to its group: not to the child
    os.killpg(process.pid, signum)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == status
    assert (out / "long/signals").read_text() == f"{int(signum)} "
    assert (out / "long/saved").exists()
    assert stderr == f"suite.py: stopped by {signum.name}\n"
    assert "the same command goes on from here" in stdout
    assert states(out) == {"long": "stopped"}


def test_a_killed_suite_leaves_no_child_and_goes_on_where_it_was(work, write, run, out, tmp_path):
    gate = tmp_path / "gate"
    jobs = {
        "done": {"command": work, "makes": {"text": "made.txt"}},
        "resumes": {"command": f"{work} {{text}} --resume until={gate}"},
        "restarts": {"command": f"{work} {{text}} until={gate}"},
    }
    suite = write(jobs)
    process = subprocess.Popen(command(suite, out), **PIPES)
    wait_for(lambda: sorted(started(out)) == ["done", "restarts", "resumes"])
    process.kill()
    process.communicate(timeout=20)
    children = [words[3] for words in notes(out) if words[0] == "start"]
    wait_for(lambda: not any(alive(child) for child in children))  # asked by Linux, not by us
    gate.touch()
    done = run(suite)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(out) == {"done": "reused", "resumes": "done", "restarts": "done"}
    assert (out / "resumes/attempts").read_text() == "xx"
    assert (out / "restarts/attempts").read_text() == "x"
    assert "resumes: goes on where it was" in done.stdout


def test_two_suites_never_write_to_one_folder(work, write, run, out, tmp_path):
    gate = tmp_path / "gate"
    suite = write({"long": {"command": f"{work} until={gate}"}})
    process = subprocess.Popen(command(suite, out), **PIPES)
    wait_for(lambda: started(out))
    second = run(suite)
    gate.touch()
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert f"a suite is at work here (process {process.pid})" in second.stderr
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert started(out) == ["long"]


def test_a_terminal_shows_a_table_with_a_bar_and_ends_with_the_report(work, write, out, tmp_path):
    gate = tmp_path / "gate"
    suite = write({"long": {"command": f"{work} until={gate}"}, "b": {"command": work}})
    parent, child = pty.openpty()
    process = subprocess.Popen(command(suite, out), stdout=child, stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if "█████████░░░ step 3/4".encode() in shown:
            gate.touch()
    assert process.wait(20) == 0
    text = shown.decode()
    assert "\x1b[2F\x1b[J" in text
    assert "running" in text
    assert text.splitlines()[-1] == f"report: {out}/report.html"


def test_quiet_prints_only_the_report(work, write, run, out):
    done = run(write({"a": {"command": work}}), "--quiet")
    assert (done.stdout, done.stderr) == (f"report: {out}/report.html\n", "")


def test_dry_run_shows_the_graph_and_writes_nothing(work, write, run, out):
    done = run(write(chain(work)), "--dry-run")
    assert done.returncode == 0
    assert "would run: third, after first, second" in done.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.pth"], "checkpoint gone.pth: no such file"),
        (["--suite", "quik"], "suite 'quik': not found; suites near it: quick"),
        (["--suite", "quick", "--output-dir", "/proc/nowhere"], "cannot be written"),
        (["--sweet", "quick"], "unrecognized arguments: --sweet"),
        (["--override", "coc", "A", "1"], "--override coc: fits no job; jobs are coco/moco"),
        (["--suite", "quick", "--data", "coco=x"], "--data coco=x: want NAME=PATH"),
        (["--slurm", "time=1"], "--slurm time=1: is for --on slurm"),
        (["--seeds", "0"], "--seeds 0: want a whole number from 1"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(tmp_path, words, said):
    done = subprocess.run([sys.executable, SUITE, *words], **PIPES, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        (
            {"a": {"command": "python x.py {b}", "makes": {"a": "a"}}},
            "reads {b}, which no job makes",
        ),
        (
            {
                "a": {"command": "python x.py {y}", "makes": {"x": "x"}},
                "b": {"command": "python x.py {x}", "makes": {"y": "y"}},
            },
            "wait for each other: a, b",
        ),
        ({"a": {"comand": "python x.py"}}, "unknown key 'comand'; known: command"),
        ({"a": {"command": "rm -rf x"}}, "want: python script.py"),
        ({"../a": {"command": "python x.py"}}, "a name is lower-case words"),
        ({"jobs/a": {"command": "python x.py"}}, "a name is lower-case words"),
        ({}, "found no jobs"),
        ({"a": {"command": "python x.py", "data": "coco"}}, "unknown data 'coco'; known: coco2017"),
        ({"a": {"command": "python x.py", "seeds": 0}}, "seeds is 0, want a whole number from 1"),
        ({"a": {"command": "python x.py", "inits": ["moco"]}}, "want INIT: what it starts from"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_line(write, tmp_path, jobs, said):
    with pytest.raises(UserError) as error:
        main(["--suite", str(write(jobs)), "--output-dir", str(tmp_path / "o")])
    assert said in str(error.value)
    assert not (tmp_path / "o").exists()


def test_help_is_quick_and_loads_no_heavy_library():
    code = (
        "import sys; import benchmarks.suite, benchmarks.report;"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'detectron2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], **PIPES, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
    seconds = []
    for _ in range(3):  # a busy machine may delay one of them
        began = time.monotonic()
        done = subprocess.run([sys.executable, SUITE, "--help"], **PIPES)
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1
    assert "python benchmarks/suite.py ckpt.pth --suite quick" in done.stdout


def test_quick_runs_from_a_checkpoint_or_without_one(tmp_path):
    suite = load_suite("quick")
    steps = plan(suite, {}, tmp_path)
    measured = [
        f"{task}/{init}" for task in ("coco", "voc", "linear", "knn") for init in ("moco", "random")
    ]
    assert [step.name for step in steps] == ["pretrain", "convert", *measured]
    needs = {step.name: step.needs for step in steps}
    assert needs["coco/moco"] == needs["voc/moco"] == ("convert",)
    assert needs["linear/moco"] == needs["knn/moco"] == needs["convert"] == ("pretrain",)
    assert all(needs[f"{task}/random"] == () for task in ("coco", "voc", "linear", "knn"))
    checkpoint = tmp_path / "c.pth"
    checkpoint.write_bytes(b"x")
    given = plan(suite, {"checkpoint": checkpoint}, tmp_path)
    assert [step.name for step in given] == ["convert", *measured]
    words = resolve(given[0], given, {"checkpoint": checkpoint})
    assert words[2:4] == (str(checkpoint), str(tmp_path / "convert/weights.pkl"))


def test_a_key_holds_the_code_that_runs_and_the_libraries(tmp_path, monkeypatch):
    suite = load_suite("quick")

    def keys() -> dict[str, str]:
        jobs._code.cache_clear()
        return {step.name: step.key for step in plan(suite, {}, tmp_path)}

    def changed(before: dict[str, str]) -> set[str]:
        return {name for name, key in keys().items() if key != before[name]}

    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    for folder in ("convert", "transfer", "benchmarks"):
        (tmp_path / folder).mkdir()
    first = keys()
    (tmp_path / "benchmarks/page.py").touch()
    assert changed(first) == set()
    (tmp_path / "transfer/detection").mkdir()
    (tmp_path / "transfer/detection/weights.py").touch()
    assert changed(first) == {name for name in first if "/" in name}
    second = keys()
    (tmp_path / "convert/names.py").touch()
    assert changed(second) == set(first)
    third = keys()
    versions = {"versions": {"torch": "0.0"}}
    monkeypatch.setattr(jobs, "environment", lambda: versions)
    assert changed(third) == set(first)


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_script_and_recipe_that_a_suite_names_exists(file):
    for job in load_suite(file.stem).jobs:
        for word in job.command[1:]:
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).is_file(), f"{job.name}: {word}"


def test_a_forecast_sums_the_suites_own_costs_and_says_their_source(write, work, run, out, sets):
    jobs = {
        "long/moco": {"command": f"{work} {{processes}}", "minutes": 90, "gpu_gb": 4.8},
        "short/moco": {"command": work, "minutes": 30, "data": "flowers"},
    }
    jobs["long/moco"]["processes"] = 8
    done = run(write(jobs, data=sets, costs="a table"), "--dry-run", "--processes", "2")
    assert "would run: long/moco, about 1.5 h, 4.8 GB a GPU, 2 of 8 processes" in done.stdout
    assert "times and memory: a table" in done.stdout
    assert "all of it: 2 jobs, about 2.0 h one after the other; to run: 1 job" in done.stdout
    assert not out.exists()


def test_a_disk_that_fills_up_under_a_log_is_one_line_too(write, work, out):
    class Full(Local):
        def start(self, steps):
            raise OSError(errno.ENOSPC, "No space left on device")

    out.mkdir()
    suite = load_suite(str(write({"a": {"command": work}})))
    runner = Runner(suite, plan(suite, {}, out), {}, out, Quiet(), Full(1))
    with pytest.raises(UserError, match="the disk is full; make room, and the same command goes"):
        runner.run()
