import json

import pytest
from PIL import Image

from benchmarks import leak_meter
from convert.errors import UserError


def curves(shuffled, apart):
    same = [value + 1 for value in shuffled]
    ways = {"leak_same": same, "leak_shuffled": shuffled, "leak_apart": apart}
    return {way: [values, values] for way, values in ways.items()}


def test_what_is_said_is_the_mean_of_the_last_third():
    said = leak_meter.said(curves([0, 0, 0, 0, 50, 60], [0, 0, 0, 0, 20, 30]))
    assert said.startswith("a leak of +30.0 points: 55.0% of queries find a key encoded as the run")
    assert "25.0% one encoded among any images, 56.0% one of the query's own group" in said


def test_both_runs_are_drawn(tmp_path):
    found = {1: curves([10, 50, 90], [10, 12, 14]), 8: curves([10, 30, 60], [10, 30, 60])}
    leak_meter.draw(found, {1: [42, 84, 126], 8: [5, 10, 15]}, tmp_path / "leak.png")
    with Image.open(tmp_path / "leak.png") as image:
        assert image.size == (1100, 440)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_both_runs_are_trained_and_measured_once(tmp_path, capsys, monkeypatch):
    asked = []

    def trained(
        script, words, *, quiet
    ):  # what a run leaves behind; the run itself is a test above
        from pathlib import Path

        folder = Path(words[words.index("--output-dir") + 1])
        folder.mkdir(parents=True)
        found = {"leak_same": 25.0, "leak_apart": 20.0}
        lines = [{"step": s, "leak_shuffled": 20.0 + s, **found} for s in range(3)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text("{}")
        asked.append(" ".join(words))

    monkeypatch.setattr(leak_meter.child, "run", trained)
    words = ["--output-dir", str(tmp_path / "out"), "iterations", "9"]
    for _ in range(2):
        assert leak_meter.main(words) == 0
    assert [line.split("--bn-groups ")[1][:1] for line in asked] == ["1", "8"]
    assert all(line.endswith("iterations 9") for line in asked)
    assert "batch_size 32 K 128 iterations" in asked[0]
    assert "batch_size 256 K 1024 iterations" in asked[1]
    assert all("--leak-meter --leak" in line for line in asked)
    assert "1 batch norm groups: a leak of +2.0 points: 22.0% of" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/leak.json").read_text())
    assert record["curves"]["8"]["leak_shuffled"] == [[20.0, 21.0, 22.0]]


def test_no_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="--seeds 0: want 1 or more"):
        leak_meter.main(["--seeds", "0"])
