import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from convert.errors import UserError
from pretrain import main_moco
from pretrain.curves import PANELS, draw, held, points, report, smooth
from pretrain.loop import train
from pretrain.monitor import COLUMNS, Watch
from pretrain.sources import image_folder
from tests.test_main_moco import pictures, small_config  # noqa: F401


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):  # noqa: F811
    """A run that learns nothing, which is said; with the leak meter."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(pictures, lr=0.0, epochs=3, leak_meter=True)
    train(config, image_folder(pictures / "train"), folder, quiet=True)
    return folder


def test_a_run_is_redrawn_as_a_picture_and_a_page_that_needs_nothing_beside_it(run, capsys):
    assert main_moco.main(["--report", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(run / "report.png"),
        str(run / "report.html"),
    ]
    with Image.open(run / "report.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn
    text = (run / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(.{10})', text) == ["data:image"]
    inside = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert inside == (run / "report.png").read_bytes()
    assert "chance: the loss has been" in text
    assert "Holding at the end of the log: chance." in text
    for panel in PANELS:
        drawn = panel.title != "kNN vote on backbone features"
        assert (f"<td>{panel.title}: " in text) == drawn


def test_equal_logs_are_drawn_equal_and_verdicts_and_curves_are_seen():
    lines = [
        {"step": i, "epoch": i / 4, "loss": 5 - i / 10, "chance_loss": 5.0, "top1": 10 + i}
        for i in range(1, 30)
    ]
    plain = draw(lines, "a run")
    assert plain == draw(lines, "a run")
    marked = [*lines[:9], lines[9] | {"verdicts": ["chance: it is"]}, *lines[10:]]
    other = [*lines[:-1], lines[-1] | {"loss": 9.0}]
    size = Image.open(io.BytesIO(plain)).size
    for changed in (draw(marked, "a run"), draw(other, "a run")):
        assert changed != plain
        assert Image.open(io.BytesIO(changed)).size == size


def test_verdicts_hold_from_the_line_that_begins_them_to_the_one_that_ends_them():
    lines = [
        {"step": 1, "epoch": 0.5, "verdicts": ["chance: is", "starved: is"]},
        {"step": 2, "epoch": 1.0},
        {"step": 3, "epoch": 1.5, "verdicts": ["chance: over after 2 steps"]},
        {"step": 4, "epoch": 2.0},
    ]
    spans = [(span.name, span.since, span.until) for span in held(lines)]
    assert spans == [("chance", 0.5, 1.5), ("starved", 0.5, 2.0)]


def test_every_value_of_the_log_that_is_no_place_or_time_has_a_curve():
    drawn = {c.key for p in PANELS for c in [*p.curves, *([p.right] if p.right else [])]}
    assert set(COLUMNS) - drawn == {"step", "steps", "epoch", "seconds", "queue_random", "verdicts"}
    assert points([{"step": 1, "epoch": 0.5, "lr": 1.0}, {"step": 2, "epoch": 1.0}], "lr") == (
        [0.5],
        [1.0],
    )
    assert smooth([1.0, 5.0, 3.0], 0.7) == [1.0, 3.0, 3.0]


def test_a_log_of_votes_alone_is_drawn(tmp_path):
    watch = Watch(tmp_path, 0)
    watch.add(step=0, epoch=0.0, knn_top1=30.0)
    watch.log.close()
    assert all(path.exists() for path in report(tmp_path))


def test_a_folder_without_a_log_is_refused_in_one_line(script, tmp_path):
    with pytest.raises(UserError, match="found no line of a log"):
        report(tmp_path)
    done = script("pretrain/main_moco.py", "--report", "nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "main_moco.py: --report nowhere: found no line of a log.jsonl; name the output folder of a "
        "run\n"
    )
