"""Files are known by what is in them, read without running their code, and refused in one line."""

import argparse
import collections
import datetime
import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from convert import reading
from convert.backbone import load_backbone
from convert.errors import UserError
from convert.reading import Placeholder, read_file
from tests.small_sets import write_resnet18


class OfTheTest:
    """A class that no checkpoint reader knows."""

    def __init__(self):
        self.inside = 1


def beside_weights():
    """What training scripts save beside their weights."""
    return {
        "args": argparse.Namespace(lr=0.03, data=Path("/data")),
        "path": Path("/data"),
        "date": datetime.datetime(2020, 1, 1),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "best": np.float64(71.5),
        "curve": np.arange(3),
        "rng": np.random.RandomState(0).get_state(),
        "own": OfTheTest(),
        "function": os.path.join,
        "sets": {1, 2},
    }


def weights():
    return {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}


def save_zip(path, content):
    torch.save(content, path)


def save_legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def save_old_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_gzip(path, content):
    torch.save(content, path)
    path.write_bytes(gzip.compress(path.read_bytes()))


SAVERS = [save_zip, save_legacy, save_pickle, save_old_pickle, save_gzip]


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("name", ["a.pth.tar", "a.pkl", "a"])
def test_tensors_are_read_whatever_stands_beside_them(tmp_path, save, name):
    save(tmp_path / name, {"state_dict": weights()} | beside_weights())
    values = read_file(tmp_path / name).values
    found = values["state_dict"]
    assert torch.equal(found["w"], weights()["w"])
    assert found["half"].dtype == torch.bfloat16
    assert values["sets"] == {1, 2}
    assert values["counts"]["a"] == [1]
    for key in ("args", "path", "date", "own"):
        assert isinstance(values[key], Placeholder), key
    assert issubclass(values["function"], Placeholder)
    assert float(values["best"]) == 71.5
    assert np.array_equal(values["curve"], [0, 1, 2])


def test_a_parameter_is_read_as_its_tensor(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2)), "x": OfTheTest()}, tmp_path / "a.pth")
    assert torch.equal(read_file(tmp_path / "a.pth").values["w"], torch.ones(2))


def test_safetensors_are_read_with_their_words(tmp_path):
    from safetensors.torch import save_file

    save_file(weights(), tmp_path / "a.pth", metadata={"format": "pt", "by": "test"})
    content = read_file(tmp_path / "a.pth")
    assert torch.equal(content.values["w"], weights()["w"])
    assert content.metadata["by"] == "test"


# --- nothing runs ---------------------------------------------------------------------------------


class Calls:
    """A pickle that calls a function with arguments when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def mark(*_):
    raise AssertionError("unpickled code ran")


def hostiles():
    touch = "open('hostile_was_here', 'w')"
    return {
        "system": Calls(os.system, "touch hostile_was_here"),
        "open": Calls(open, "hostile_was_here", "w"),
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "import": Calls(__import__, "antigravity"),
        "getattr": Calls(getattr, "text", "upper"),
        "torch.load": Calls(torch.load, "other.pth"),
        "mark": Calls(mark),
        "encode": Calls(pickle.loads, pickle.dumps(Calls(os.system, "touch hostile_was_here"))),
    }


@pytest.mark.parametrize("name", hostiles())
@pytest.mark.parametrize("save", SAVERS)
def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch, save, name):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.pth", {"state_dict": weights(), "x": [hostiles()[name]]})
    values = read_file(tmp_path / "a.pth").values
    assert isinstance(values["x"][0], Placeholder)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_bytes_in_another_codec_are_no_bytes(tmp_path):
    stolen = b"c_codecs\nencode\n(Vabc\nVrot13\ntR."
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + stolen)
    with pytest.raises(UserError, match="bytes in rot13"):
        read_file(tmp_path / "a.pkl")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    class Long:
        def __reduce__(self):
            storage = torch.zeros(4).untyped_storage()
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (typed, 0, (1 << 40,), (1,), False, None)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": Long()}))
    with pytest.raises(UserError, match="does not fit into its storage"):
        read_file(tmp_path / "a.pkl")


# --- nothing grows --------------------------------------------------------------------------------


def test_a_zip_that_would_grow_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(200 << 20))
    with pytest.raises(UserError, match=r"would grow from [\d,]+ to 209,715,\d+ bytes"):
        read_file(path)


def test_a_gzip_that_would_grow_is_refused_while_it_does(tmp_path):
    path = tmp_path / "bomb.pth.gz"
    path.write_bytes(gzip.compress(bytes(200 << 20)))
    with pytest.raises(UserError, match="would grow from"):
        read_file(path)


def test_an_oversized_header_of_safetensors_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"a": 1}')
    with pytest.raises(UserError, match="its header claims"):
        read_file(path)


# --- what is no checkpoint ------------------------------------------------------------------------


def bad_content():
    network = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), network)
    whole = io.BytesIO()
    torch.save(weights(), whole)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("tensors"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as inner:
        inner.writestr("photos/a.txt", "a")
    return {
        "empty": (b"", "is empty; fetch it again"),
        "page": (b"  <!DOCTYPE html><html>404</html>", "is a web page"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        "tar": (archive.getvalue(), "is a tar archive"),
        "zip": (packed.getvalue(), "is a zip archive of 'photos/a.txt', and no checkpoint"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file"),
        "text": (b"hello", "begins with b'hello', which no checkpoint does"),
        "cut zip": (whole.getvalue()[:-40], "is cut short"),
        "cut pickle": (pickle.dumps(weights())[:-40], "cannot be read"),
        "cut safetensors": (struct.pack("<Q", 900) + b'{"a"', "its header claims"),
        "cut gzip": (gzip.compress(os.urandom(5000))[:-600], "it is cut short"),
        "network": (network.getvalue(), "a whole pickled object (torch.nn.modules.linear.Linear)"),
        "list": (pickle.dumps([1, 2]), "holds a list, want a dictionary of tensors"),
    }


@pytest.mark.parametrize("name", bad_content())
def test_what_is_no_checkpoint_gets_its_line(tmp_path, name):
    content, line = bad_content()[name]
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_backbone(tmp_path / "bad.pth")
    assert line in str(caught.value)
    assert "bad.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_script_program_is_refused(tmp_path):
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(program, tmp_path / "a.pt")
    with pytest.raises(UserError, match="is a TorchScript program; save its weights"):
        read_file(tmp_path / "a.pt")


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path):
    whole = write_resnet18(tmp_path / "whole.pth").read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="is cut short"):
            load_backbone(tmp_path / "cut.pth")


def test_an_unreadable_file_says_so(tmp_path, monkeypatch):
    path = write_resnet18(tmp_path / "a.pth")

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        read_file(path)


def test_an_old_torch_is_refused_with_the_reason(tmp_path, monkeypatch):
    path = write_resnet18(tmp_path / "a.pth")
    monkeypatch.setattr(reading.torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UserError, match=r"torch 2\.9\.1.*CVE-2025-32434.*want 2\.10"):
        read_file(path)


def test_weights_do_not_hang_on_their_file(tmp_path):
    path = write_resnet18(tmp_path / "a.pth")
    backbone = load_backbone(path)
    before = backbone.weights["conv1.weight"].clone()
    path.write_bytes(bytes(path.stat().st_size))  # in place: a mapped tensor would turn to zero
    assert torch.equal(backbone.weights["conv1.weight"], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_the_facts_say_so(tmp_path, dtype):
    state = torchvision.models.resnet18().state_dict()
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(cast, tmp_path / "a.pth")
    backbone = load_backbone(tmp_path / "a.pth")
    assert backbone.facts.dtype == str(dtype).removeprefix("torch.")
    assert backbone.weights["conv1.weight"].dtype == torch.float32
    assert torch.equal(backbone.weights["conv1.weight"], cast["conv1.weight"].float())
