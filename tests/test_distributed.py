"""MoCo on any number of processes is the same MoCo; real processes, gloo, a CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from PIL import Image

from convert.errors import UserError
from pretrain.distributed import Launch, _handshake, group, run_children
from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Eighty small images, one class."""
    folder = tmp_path_factory.mktemp("photos") / "train"
    (folder / "a").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(80):
        pixels = draw.integers(0, 255, (12, 12, 3), dtype=np.uint8)  # enlarged: it has structure
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(
            folder / "a" / f"{i:02}.png"
        )
    return folder


SMALL = {
    "arch": "resnet18", "dim": 16, "K": 48, "m": 0.9, "tau": 0.2, "mlp": True, "epochs": 9,
    "augmentation": "v2", "batch_size": 32, "bn_groups": 4, "image_size": 32, "device": "cpu",
    "precision": "fp32", "workers": 0, "lr": 0.05,
}  # fmt: skip


SHORT = {"steps": 2, "batch_size": 16}
JOBS = {
    "queue": {"steps": 10},
    "float32": {"steps": 1, "dtype": "float32"},
    "symmetric": SHORT | {"symmetric": True},
    "whole": SHORT | {"bn_groups": 1, "leak": True},
    "bank": SHORT | {"dictionary": "bank", "bank_momentum": 0.5},
    "end-to-end": SHORT | {"dictionary": "end-to-end"},
    "simclr": SHORT | {"dictionary": "simclr", "optimizer": "lars", "bn_groups": 0},
}
HALVES = {"accumulate": 2}
PARTS = {f"{name} in parts": JOBS[name] | HALVES for name in ("queue", "symmetric", "bank")}


def run_group(photos, folder, processes, jobs):
    """Do jobs on a group of processes; return each one's losses and state."""
    named = {}
    for name, changes in jobs.items():
        config = SMALL | changes
        job = {key: config.pop(key, None) for key in ("steps", "dtype", "plain")}
        named[name] = job | {"dtype": job["dtype"] or "float64", "config": config}
    file = folder / "spec.json"
    spec = {"images": str(photos), "folder": str(folder), "jobs": named}
    file.write_text(json.dumps(spec))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    group = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/processes.py"), str(file)],
            env=os.environ | shared | {"RANK": str(rank), "WORLD_SIZE": str(processes)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=400)[1] for process in group]
    assert all(process.returncode == 0 for process in group), errors
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in jobs}


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory):
    """What 1, 2 and 4 processes compute, by their number."""
    on_two = {name: job for name, job in PARTS.items() if "queue" not in name}
    as_usual = SHORT | {"bn_groups": 2}
    on_two |= {"two groups": as_usual, "plain": as_usual | {"plain": True}}
    jobs = {1: JOBS | PARTS, 2: JOBS | on_two, 4: {"queue": JOBS["queue"]}}
    return {
        n: run_group(photos, tmp_path_factory.mktemp(f"group{n}"), n, todo)
        for n, todo in jobs.items()
    }


def assert_same(one, two, tolerance=1e-9):
    torch.testing.assert_close(
        torch.tensor(one["values"]), torch.tensor(two["values"]), rtol=tolerance, atol=tolerance
    )
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(
            value, two["state"][name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_computes_the_same_moco_over_10_steps(found, processes):
    assert_same(found[1]["queue"], found[processes]["queue"])
    losses = [values[0] for values in found[1]["queue"]["values"]]
    assert len(set(losses)) == 10


def test_in_float32_the_first_loss_is_the_same(found):
    first = [found[n]["float32"]["values"][0][0] for n in (1, 2)]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


@pytest.mark.parametrize("method", ["symmetric", "whole", "bank", "end-to-end", "simclr"])
def test_every_method_is_the_same_on_two_processes(found, method):
    assert_same(found[1][method], found[2][method])


@pytest.mark.parametrize(
    ("method", "processes"),
    [("queue", 1), ("symmetric", 1), ("symmetric", 2), ("bank", 1), ("bank", 2)],
)
def test_a_step_in_parts_is_the_step(found, method, processes):
    assert_same(found[1][method], found[processes][f"{method} in parts"])


def test_two_processes_compute_what_the_plain_recipe_does(found):
    ours, theirs = found[2]["two groups"], found[2]["plain"]
    for mine, plain in zip(ours["values"], theirs["values"], strict=True):
        assert mine[0] == pytest.approx(plain[0], abs=1e-9)
    for name, value in theirs["state"].items():
        if "running_" not in name:  # the mean over groups; the plain recipe's are process 0's
            torch.testing.assert_close(ours["state"][name], value, rtol=1e-9, atol=1e-9)


MAIN = [sys.executable, str(ROOT / "pretrain/main_moco.py")]
REFERENCE = "-a resnet18 -b 16 --moco-k 48 -j 1 --max-steps 1 --precision fp32 image_size 32"


def test_the_references_flags_join_two_nodes(photos, tmp_path):
    words = [*MAIN, str(photos.parent), *REFERENCE.split(), "--dist-backend", "nccl"]
    words += ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--multiprocessing-distributed"]
    nodes = [
        subprocess.Popen(
            [*words, "--world-size", "2", "--rank", str(node)],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    first = said[0][0]
    assert "dist-backend nccl -> gloo: this run is on a CPU" in first
    assert "batch_size 16 a node -> 32 on 2 nodes" in first
    assert said[1][0] == ""  # one process speaks for all
    record = json.loads((tmp_path / "output/pretrain/moco_v1_resnet18/run.json").read_text())
    assert (record["processes"], record["batch_size"]) == (2, 32)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_does_not_form_ends_in_one_line(photos, tmp_path, rank):
    words = [*MAIN, str(photos.parent), *REFERENCE.split(), "--multiprocessing-distributed"]
    words += ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--world-size", "2"]
    done = subprocess.run(
        [*words, "--rank", str(rank), "--dist-timeout", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("main_moco.py: process group at tcp://127.0.0.1:")
    assert "no group of 2 processes within 1 s" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "output").exists()


def test_the_launcher_starts_children_with_their_ranks_and_ends_all_with_one(tmp_path, capfd):
    code = "import os, sys, time; r = int(os.environ['RANK']);"
    code += "print(r, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], flush=True);"
    launch = Launch(spawn=True, nodes=2, node=1)
    assert run_children([sys.executable, "-c", code], 2, launch) == 0
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "2 4 0", "3 4 1"]
    code += "sys.exit(3) if r == 3 else time.sleep(60)"
    assert run_children([sys.executable, "-c", code], 2, launch) == 3
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_children([sys.executable, "-c", code], 1, launch) == 128 + signal.SIGKILL
    assert "ended by SIGKILL; memory may have run out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("launch", "line"),
    [
        (Launch(nodes=2, node=2), "--rank 2: want 0 to 1, as --world-size is 2"),
        (Launch(backend="mpi"), "--dist-backend mpi: want nccl or gloo"),
        (Launch(timeout_s=float("nan")), "--dist-timeout nan: want seconds above 0"),
        (Launch(timeout_s=0), "--dist-timeout 0: want seconds above 0"),
        (Launch(timeout_s=1e30), "--dist-timeout 1e.30: want seconds above 0, 30 days at most"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(launch, line):
    with pytest.raises(UserError, match=line), group(launch, "cpu"):
        pass


@pytest.mark.parametrize(("place", "count"), [("x", "2"), ("2", "2"), ("0", "-2"), ("-1", "2")])
def test_a_place_that_cannot_be_is_refused(place, count, monkeypatch):
    monkeypatch.setenv("RANK", place)
    monkeypatch.setenv("WORLD_SIZE", count)
    line = f"RANK={place} WORLD_SIZE={count} in the environment"
    with pytest.raises(UserError, match=line), group(Launch(), "cpu"):
        pass


def hands(store, count, seconds=20):
    """Have processes shake hands over a store; return the parts of it that they were given."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(count) as threads:
        places = range(count)
        return list(threads.map(lambda r: _handshake(store, r, count, end, []), places))


def test_a_group_that_meets_again_in_the_same_store_does_not_read_the_old_ones_words():
    store = dist.HashStore()
    for attempt in ("first", "second"):
        ours = hands(store, 3)
        assert not ours[2].check(["address"])
        ours[0].set("address", attempt)
        assert ours[2].get("address").decode() == attempt


def test_what_an_earlier_group_left_is_nobody_who_came():
    store = dist.HashStore()
    hands(store, 2)
    found = []
    with pytest.raises(TimeoutError):
        _handshake(store, 0, 2, time.monotonic() + 0.3, found)
    assert found == [0]


def test_a_signal_ends_a_process_that_waits_for_the_others(tmp_path):
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    code = "from convert.errors import run_script; from pretrain.distributed import group, Launch\n"
    code += "def main(_):\n print('here', flush=True)\n with group(Launch(), 'cpu'): return 0\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + "run_script(main)"], cwd=ROOT, stdout=subprocess.PIPE,
        env=os.environ | place | {"MASTER_PORT": str(free_port())},
    )  # fmt: skip
    assert process.stdout.readline() == b"here\n"
    time.sleep(0.5)
    process.terminate()
    process.communicate(timeout=20)  # its own time would be 300 s
    assert process.returncode in {-signal.SIGTERM, 128 + signal.SIGTERM}


def test_flags_that_torchrun_gives_to_all_are_refused_once(tmp_path):
    lines = []
    for rank in "01":
        place = {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
        done = subprocess.run(
            [*MAIN, "--lr", "fast"], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | place,
        )  # fmt: skip
        assert done.returncode == 2
        lines += done.stderr.splitlines()
    assert lines == ["main_moco.py: command line: lr is 'fast', want float"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            [["--init-from", "a.pth"], ["--init-from", "b.pth"]],
            "main_moco.py: the processes of this run begin with different weights: the file",
        ),
        (
            [["--lr", "0.1"], ["--moco-t", "0.1"]],
            "main_moco.py: the processes of this run differ in tau, lr; start all of them with the",
        ),
    ],
)
def test_what_stops_all_processes_is_said_once(photos, tmp_path, words, line):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / f"{name}.pth")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [*MAIN, str(photos.parent), *REFERENCE.split(), *words[rank]], cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank)}, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    (only,) = [ln for ln in said[0] + said[1] if not ln.startswith("pretrain: ")]
    assert only.startswith(line)
    assert not list(tmp_path.rglob("checkpoint_*"))
