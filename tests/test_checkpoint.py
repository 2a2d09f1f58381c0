"""The states of a run under way: the newest whole one is gone on from."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import torch

from convert.errors import UserError
from transfer.detection import checkpoint


def state(done: int, **more: Any) -> dict[str, Any]:
    whole = {"model": {}, "trainer": {}, "next_iteration": done, "streams": 1, "moco_transfer": {}}
    return whole | more


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.list_states(folder)]


def test_the_newest_few_are_kept_by_number_and_not_by_age(tmp_path) -> None:
    for done in (5, 10000000, 20, 9):
        checkpoint.save_state(tmp_path, state(done), keep=2)
    assert names(tmp_path) == ["checkpoint_0000020.pth", "checkpoint_10000000.pth"]
    checkpoint.save_state(tmp_path, state(21), keep=0)
    assert len(names(tmp_path)) == 3
    checkpoint.forget_states(tmp_path)
    assert names(tmp_path) == []


def test_a_damaged_state_gives_way_to_the_one_before_it(tmp_path) -> None:
    said: list[str] = []
    assert checkpoint.read_state("auto", tmp_path, said.append) is None
    for done in (5, 6):
        checkpoint.save_state(tmp_path, state(done), keep=0)
    newest = checkpoint.path_of(tmp_path, 6)
    newest.write_bytes(newest.read_bytes()[:100])
    found = checkpoint.read_state("auto", tmp_path, said.append)
    assert found is not None
    assert found["next_iteration"] == 5
    assert "checkpoint_0000006.pth: is damaged" in said[0]
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read_state(str(newest), tmp_path, said.append)
    checkpoint.path_of(tmp_path, 5).write_bytes(b"")
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        checkpoint.read_state("auto", tmp_path, said.append)


def test_a_trained_detector_is_no_state_to_go_on_from(tmp_path) -> None:
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match="is no checkpoint of a run under way"):
        checkpoint.read_state(str(tmp_path / "model_final.pth"), tmp_path, print)
