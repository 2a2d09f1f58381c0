"""A run that was killed, stopped or moved goes on as if nothing had happened; real processes."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import find_resume
from pretrain.monitor import read_log
from tests.conftest import ROOT
from tests.test_distributed import free_port, photos  # noqa: F401
from tests.test_main_moco import assert_equal_files, wait_for

WORDS = (
    "-a resnet18 -b 16 --moco-k 48 --mlp --aug-plus --cos --lr 0.01 --epochs 3 -j 1 -p 1 --keep 0"
)
WORDS += " --device cpu --precision fp32 image_size 32 --checkpoint-every 1"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
MAIN = str(ROOT / "pretrain/main_moco.py")


def command(photos, *words):  # noqa: F811
    return [MAIN, str(photos.parent), *WORDS.split(), *map(str, words)]


def run(folder, *words, environment=ENVIRONMENT):
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def logged(folder):
    """How many steps a run has logged."""
    lines = read_log(folder)
    return lines[-1]["step"] if lines else 0


def losses(folder):
    return {line["step"]: line["loss"] for line in read_log(folder)}


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):  # noqa: F811
    """A run of 15 steps, 5 an epoch, that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, *command(photos, "--output-dir", "out"))
    return folder / "out"


def test_killed_at_five_random_steps_it_ends_in_the_same_bits(photos, unbroken, tmp_path):  # noqa: F811
    words = [sys.executable, *command(photos, "--output-dir", "out", "--resume", "auto")]
    for step in sorted(random.Random(4).sample(range(1, 15), 5)):
        process = subprocess.Popen(
            words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        wait_for(lambda s=step, p=process: logged(tmp_path / "out") >= s or p.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
    run(tmp_path, *words[1:])
    files = sorted(path.name for path in unbroken.glob("checkpoint_*"))
    assert files == [
        "checkpoint_0000.pth.tar",
        "checkpoint_0001.pth.tar",
        "checkpoint_0002.pth.tar",
    ]
    for name in files:
        assert_equal_files(unbroken / name, tmp_path / "out" / name)
    assert losses(unbroken) == losses(tmp_path / "out")
    assert len(losses(unbroken)) == 15


def test_the_newest_whole_checkpoint_is_taken(unbroken, tmp_path, capsys):
    for path in unbroken.glob("checkpoint_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    newest = tmp_path / "checkpoint_0002.pth.tar"
    assert find_resume("auto", tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert find_resume("auto", tmp_path) == tmp_path / "checkpoint_0001.pth.tar"
    assert "checkpoint_0002.pth.tar: cannot be read" in capsys.readouterr().out


def torchrun(photos, folder, *words):  # noqa: F811
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "1", "--master-port", str(free_port())]
    return subprocess.Popen(
        [*launcher, *command(photos, "--output-dir", "out", *words)], cwd=folder, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def worker(launcher: int, rank: int) -> int:
    """The process of a rank below torchrun's."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            place = f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended since
            continue
        if parent == launcher and place:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def test_torchrun_goes_on_by_itself_when_a_worker_is_killed(photos, tmp_path):  # noqa: F811
    finals = []
    for kill in (False, True):
        folder = tmp_path / str(kill)
        folder.mkdir()
        process = torchrun(photos, folder, "--max-steps", "8")
        if kill:
            wait_for(lambda f=folder: logged(f / "out") >= 3, seconds=200)
            os.kill(worker(process.pid, 1), signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert ("resumed out/checkpoint_" in said) == kill, said
        finals.append(folder / "out/checkpoint_0001.pth.tar")
    assert_equal_files(*finals)


def start_group(photos, folder, count, *words):  # noqa: F811
    """Start processes as torchrun would, without it."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *command(photos, *words)],
            cwd=folder, env=ENVIRONMENT | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def test_a_signal_to_one_process_stops_all_at_one_step(photos, tmp_path):  # noqa: F811
    group = start_group(photos, tmp_path, 2, "--output-dir", "out", "--checkpoint-every", 99)
    wait_for(lambda: logged(tmp_path / "out") >= 2)
    group[1].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=120) for process in group]
    assert [process.returncode for process in group] == [128 + signal.SIGUSR1] * 2, said
    assert sum(errors.count("stopped by SIGUSR1") for _, errors in said) == 1
    (path,) = (tmp_path / "out").glob("checkpoint_*")
    step = torch.load(path, weights_only=True)["moco_transfer"]["step"]
    assert step == logged(tmp_path / "out")


def test_stopped_on_4_processes_it_goes_on_with_2(photos, tmp_path):  # noqa: F811
    def group(count, *words):
        words = ["-b", 32, "--checkpoint-every", 3, "--views", "pillow", *words]
        processes = start_group(photos, tmp_path, count, *words)
        said = [process.communicate(timeout=300) for process in processes]
        assert all(process.returncode == 0 for process in processes), said
        return said[0][0]

    # 2 steps an epoch: the checkpoint of step 3 lies in the middle of the second one.
    group(4, "--output-dir", "four", "--max-steps", 5)
    saved = "four/checkpoint_0001.pth.tar"
    assert torch.load(tmp_path / saved, weights_only=True)["moco_transfer"]["step"] == 3
    said = group(2, "--output-dir", "two", "--resume", saved, "--max-steps", 4)
    assert f"resumed {saved} at step 3" in said
    four, two = losses(tmp_path / "four"), losses(tmp_path / "two")
    assert two.keys() == {4}
    assert two[4] == pytest.approx(four[4], abs=1e-5)
