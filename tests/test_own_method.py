"""The example of docs/own_method.md, run as it is printed there."""

import re

import torch

from convert.backbone import load_backbone
from pretrain.monitor import read_log
from tests.conftest import ROOT

PAGE = ROOT / "docs/own_method.md"


def test_the_printed_example_is_short_trains_and_goes_on(script, tmp_path):
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    assert len(blocks["python"].strip().splitlines()) <= 35
    (tmp_path / "decoupled.py").write_text(blocks["python"])
    (tmp_path / "decoupled.yaml").write_text(blocks["yaml"])
    words = ["--config", "decoupled.yaml", "--device", "cpu", "--output-dir", "out", "-p", "5"]
    words += ["--checkpoint-every", "20", "-j", "1", "--views", "pillow"]
    for steps in (20, 40):
        done = script("pretrain/main_moco.py", *words, "--max-steps", steps, "--resume")
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Decoupled, resnet18, on ")
    assert "at step 20 of 40" in done.stdout
    losses = [line["loss"] for line in read_log(tmp_path / "out")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
    (path,) = (tmp_path / "out").glob("checkpoint_*")
    facts = load_backbone(path).facts
    assert (facts.method, facts.arch) == ("Decoupled", "resnet18")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert "module.encoder_q.fc.4.weight" in state
