import json
import os
import pickle
import re

import numpy as np
import pytest
import torch

from convert.backbone import load_backbone
from convert.certificate import convert
from convert.errors import UserError
from convert.reading import read_file
from tests.conftest import moco_state
from tests.test_backbone import bad_files


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reference_conversion(state):
    """The renames that moco-facts of the reference list, in their order, head included."""
    renamed = {}
    for key, value in state.items():
        if not key.startswith("module.encoder_q."):
            continue
        key = key.replace("module.encoder_q.", "")
        key = key if "layer" in key else f"stem.{key}"
        for stage in (1, 2, 3, 4):
            key = key.replace(f"layer{stage}", f"res{stage + 1}")
        for number in (1, 2, 3):
            key = key.replace(f"bn{number}", f"conv{number}.norm")
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[key] = value.numpy()
    return renamed


@pytest.mark.parametrize("mlp", [False, True])
def test_arrays_equal_the_references_apart_from_its_head(in_tmp, mlp):
    state = moco_state(mlp=mlp)
    torch.save({"state_dict": state}, "ckpt.pth")
    certificate = convert(in_tmp / "ckpt.pth")
    ours = pickle.loads((in_tmp / "ckpt.pkl").read_bytes())["model"]
    theirs = {k: v for k, v in reference_conversion(state).items() if not k.startswith("stem.fc")}
    assert len(theirs) == 318
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    tensors = certificate["tensors"]
    assert (tensors["landed"], tensors["expected"], tensors["counters"]) == (265, 265, 53)


def test_detectron2s_own_checkpointer_lands_every_tensor(in_tmp, moco_v2_file):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    convert(moco_v2_file, in_tmp / "out.pkl")
    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.BACKBONE.FREEZE_AT = 0
    model = build_model(config)
    DetectionCheckpointer(model).load(str(in_tmp / "out.pkl"))
    state, arrays = model.state_dict(), read_file(in_tmp / "out.pkl").values["model"]
    for name, array in arrays.items():
        home = "roi_heads." if name.startswith("res5") else "backbone."
        assert np.array_equal(state[home + name].numpy(), array), name


def test_the_proof_sees_a_wrong_tensor(in_tmp, moco_v2_file, monkeypatch):
    pytest.importorskip("detectron2")
    from convert import certificate

    right = certificate.to_detectron2
    swapped = {
        "layer3.1.bn1.weight": "layer3.2.bn1.weight",
        "layer3.2.bn1.weight": "layer3.1.bn1.weight",
    }
    backbone = load_backbone(moco_v2_file)
    backbone.weights["layer3.1.bn1.weight"].mul_(1.5)  # tell the two apart
    monkeypatch.setattr(certificate, "load_backbone", lambda path, options: backbone)
    monkeypatch.setattr(certificate, "to_detectron2", lambda name: right(swapped.get(name, name)))
    with pytest.raises(UserError, match=r"features differ by .* nothing was written"):
        convert(moco_v2_file, in_tmp / "out.pkl")
    assert list(in_tmp.iterdir()) == []


def test_the_features_are_equal_in_c4_and_fpn(in_tmp, moco_v2_file):
    pytest.importorskip("detectron2")
    proof = convert(moco_v2_file, in_tmp / "out.pkl")["proof"]
    assert proof["ran"]
    for target in ("c4", "fpn"):
        assert proof[target]["relative"] <= 1e-5
        assert proof[target]["scale"] > 1  # features, and not zeros, were compared


def test_the_file_names_no_module_of_numpy_2_alone(in_tmp, moco_v2_file):
    convert(moco_v2_file, in_tmp / "out.pkl")
    content = (in_tmp / "out.pkl").read_bytes()
    assert b"numpy._core" not in content
    assert content[:2] == b"\x80\x03"


def test_a_round_trip_is_bit_equal(in_tmp, moco_v2_file):
    convert(moco_v2_file, in_tmp / "out.pkl")
    before, after = load_backbone(moco_v2_file), load_backbone(in_tmp / "out.pkl")
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)
    assert after.facts == before.facts


def test_without_detectron2_the_certificate_says_what_did_not_run(
    in_tmp, moco_v2_file, monkeypatch
):
    from convert import certificate

    monkeypatch.setattr(certificate, "can_prove", lambda: False)
    proof = convert(moco_v2_file, in_tmp / "out.pkl")["proof"]
    assert not proof["ran"]
    assert "Detectron2 is not installed" in proof["reason"]


def test_typed_as_in_the_readme_it_writes_links_and_repeats_itself(script, tmp_path, moco_v2_file):
    source = tmp_path / "ckpt.pth"
    os.link(moco_v2_file, source)
    first = script("convert/to_detectron2.py", "ckpt.pth")
    assert first.returncode == 0, first.stderr
    assert re.search(r"265 of 265 landed", first.stdout)
    link = tmp_path / "output/weights.pkl"
    assert link.is_symlink()
    assert link.resolve() == tmp_path / "ckpt.pkl"
    again = script("convert/to_detectron2.py", "ckpt.pth", "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["already"]


def test_an_output_of_something_else_is_kept(script, tmp_path, moco_v2_file):
    (tmp_path / "out.pkl").write_bytes(b"precious")
    done = script("convert/to_detectron2.py", moco_v2_file, "out.pkl")
    assert done.returncode == 2
    assert "add --force" in done.stderr
    assert (tmp_path / "out.pkl").read_bytes() == b"precious"


def test_bad_files_end_in_one_line_status_2_and_no_output(script, tmp_path, moco_v2_file):
    lines = bad_files(tmp_path, moco_v2_file)
    for name in ("missing.pth", "cut.pth", "headless.pth", "page.pth"):
        line = lines[name]
        done = script("convert/to_detectron2.py", name)
        assert done.returncode == 2
        assert line in done.stderr
        assert done.stderr.count("\n") == 1
        assert not list(tmp_path.glob("*.pkl"))
    with pytest.raises(UserError, match="is a folder"):  # as of a shell's variable that is not set
        convert("")
