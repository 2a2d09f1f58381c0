import pickle

import pytest
import torch
import torchvision

from convert.backbone import build_resnet, load_backbone, random_backbone
from convert.errors import UserError
from tests.conftest import moco_state


def save(path, content):
    torch.save(content, path)
    return path


def test_moco_gives_its_query_encoder(moco_v2_file):
    backbone = load_backbone(moco_v2_file)
    state = torch.load(moco_v2_file, weights_only=True)["state_dict"]
    assert len(backbone.weights) == 318
    for name, tensor in backbone.weights.items():
        assert torch.equal(tensor, state[f"module.encoder_q.{name}"]), name
    facts = backbone.facts
    assert (facts.layout, facts.branch, facts.arch) == ("moco", "query", "resnet50")
    assert (facts.method, facts.epoch) == ("MoCo v2", 200)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_the_head_tells_v1_from_v2(tmp_path, arch):
    for mlp, method in ((False, "MoCo v1"), (True, "MoCo v2")):
        path = save(tmp_path / "a.pth", {"state_dict": moco_state(arch, mlp=mlp)})
        facts = load_backbone(path).facts
        assert (facts.arch, facts.method) == (arch, method)


def test_torchvision_files_are_read(tmp_path):
    network = torchvision.models.resnet18().eval()
    path = save(tmp_path / "resnet18.pth", network.state_dict())
    backbone = load_backbone(path)
    image = torch.randn(2, 3, 64, 64)
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.equal(build_resnet("resnet18", backbone.weights)(image), network(image))


def test_wrappers_and_key_order_change_nothing(tmp_path):
    state = moco_state("resnet18", mlp=False)
    plain = load_backbone(save(tmp_path / "a.pth", {"state_dict": state})).weights
    wrapped = {f"module._orig_mod.{name}": state[name] for name in reversed(state)}
    again = load_backbone(save(tmp_path / "b.pth", {"state_dict": wrapped})).weights
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_random_init_depends_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = random_backbone("resnet18", 3), random_backbone("resnet18", 3)
    other = random_backbone("resnet18", 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weights["conv1.weight"], second.weights["conv1.weight"])
    assert not torch.equal(first.weights["conv1.weight"], other.weights["conv1.weight"])
    assert first.facts.sha256 != other.facts.sha256


def test_a_missing_tensor_is_refused(tmp_path):
    state = moco_state("resnet18", mlp=False)
    del state["module.encoder_q.layer4.1.bn2.bias"]
    with pytest.raises(UserError, match=r"missing, first 'layer4\.1\.bn2\.bias'"):
        load_backbone(save(tmp_path / "a.pth", {"state_dict": state}))


def test_a_wrong_shape_is_refused(tmp_path):
    state = moco_state("resnet18", mlp=False)
    state["module.encoder_q.conv1.weight"] = torch.zeros(64, 3, 5, 5)
    with pytest.raises(UserError, match=r"found \(64, 3, 5, 5\), want \(64, 3, 7, 7\)"):
        load_backbone(save(tmp_path / "a.pth", {"state_dict": state}))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = moco_state("resnet18", mlp=False)
    state["module.encoder_q.bn1.running_var"][0] = float("nan")
    with pytest.raises(UserError, match=r"NaN or infinity, first 'bn1\.running_var'"):
        load_backbone(save(tmp_path / "a.pth", {"state_dict": state}))


def bad_files(folder, moco_v2_file):
    whole = moco_v2_file.read_bytes()
    torch.save({"state_dict": {"head.weight": torch.zeros(3)}}, folder / "headless.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("not a checkpoint\n")
    (folder / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "folder.pth").mkdir()
    return {
        "missing.pth": "no such file",
        "headless.pth": "no ResNet backbone that is known here; first keys are 'head.weight'",
        "list.pth": "holds a list, want a dictionary of tensors",
        "cut.pth": "cannot be read",
        "text.pth": "cannot be read",
        "page.pth": "is a web page",
        "empty.pth": "is empty",
        "folder.pth": "is a folder",
    }


def test_each_bad_file_gets_its_line(tmp_path, moco_v2_file):
    for name, line in bad_files(tmp_path, moco_v2_file).items():
        with pytest.raises(UserError) as caught:
            load_backbone(tmp_path / name)
        assert line in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self):
        return (open, ("hostile_was_here", "w"))


def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": Hostile()}))
    torch.save({"state_dict": Hostile()}, tmp_path / "b.pth")
    for name in ("a.pkl", "b.pth"):
        with pytest.raises(UserError, match="holds no ResNet backbone"):
            load_backbone(tmp_path / name)
    assert not (tmp_path / "hostile_was_here").exists()
