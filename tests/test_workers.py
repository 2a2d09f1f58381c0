"""Processes that load: a signal to all of a run does not end them; their loss ends it in a line."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from convert.errors import UserError
from pretrain.workers import load, watched
from tests.test_main_moco import children


class Numbers(Dataset):
    def __getitem__(self, index):
        return torch.full((4096,), index)


def batches(count=10_000):
    return load(Numbers(), [[i] for i in range(count)], 1, torch.stack)


@pytest.fixture
def the_worker():
    """Return the process that loads, which was not there before the test."""
    before = set(children(os.getpid()))  # other tests leave some of their libraries'

    def find() -> int:
        (worker,) = set(children(os.getpid())) - before
        return worker

    return find


def test_a_sigterm_from_elsewhere_leaves_loading_to_the_parent(the_worker):
    found = batches(200)
    next(found)
    worker = the_worker()
    os.system(f"kill -TERM {worker}")  # by another process, as a launcher's
    assert [int(batch[0, 0]) for batch in found] == [*range(1, 200)]


def test_the_parents_own_sigterm_ends_a_worker_at_once_however_often_it_comes(the_worker):
    found = batches()
    next(found)
    worker = the_worker()
    before = time.monotonic()
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGTERM)
    with pytest.raises(UserError, match="a process that loads images ended: DataLoader worker"):
        list(found)
    assert time.monotonic() - before < 30


def lose_the_worker_at(place, the_worker):
    found = batches()
    for number, _ in enumerate(found):
        if number == place:
            os.kill(the_worker(), signal.SIGKILL)


@pytest.mark.parametrize("place", range(8))
def test_a_worker_lost_at_any_moment_is_said_in_one_line(place, the_worker):
    with pytest.raises(UserError, match="DataLoader worker"), watched(1):
        lose_the_worker_at(place, the_worker)


def test_a_loss_that_is_heard_of_between_two_batches_is_said_too():
    line = r"Killed.* 3 workers are more than this machine holds"
    with pytest.raises(UserError, match=line), watched(3):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_the_signal_is_told_when_another_error_came_of_it():
    lost = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    lost.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(UserError, match="is killed by signal: Killed"), watched(1):
        raise lost


def test_other_errors_go_on_as_they_are():
    for error in (RuntimeError("shapes differ"), OSError(2, "No such file"), EOFError()):
        with pytest.raises(type(error)), watched(1):
            raise error
