import json

import pytest

from benchmarks import cifar10
from convert.errors import UserError
from convert.files import sha256
from tests.small_sets import write_images

SMALL = ["batch_size", "16", "K", "32", "bn_groups", "2", "epochs", "2", "workers", "1"]
SMALL += ["device", "cpu", "precision", "fp32"]


@pytest.mark.long
def test_the_table_has_a_row_a_method_and_what_is_done_is_not_done_again(tmp_path, capsys):
    images = write_images(tmp_path / "images", train=14)
    (images / "val").rename(images / "test")  # as CIFAR-10 is often laid out
    words = [str(images), "--methods", "random,moco", "--seeds", "1", "--quiet", *SMALL]
    words += ["--output-dir", str(tmp_path / "out")]
    assert cifar10.main(words) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out/cifar10.md").read_text()
    head, _, random, moco = text.splitlines()
    assert head.startswith("| method | seeds | kNN before, % | kNN after, % |")
    assert random.startswith("| random | 1 | – | – |")
    record = json.loads((tmp_path / "out/cifar10.json").read_text())
    row = record["rows"][1]
    assert moco.startswith(f"| moco | 1 | {row['knn_before']:.2f} | {row['knn_after']:.2f} |")
    assert 0 < row["minutes"] < 10
    assert row["chance_loss"] == pytest.approx(3.497, abs=1e-3)
    config = json.loads((tmp_path / "out/moco-0/config.json").read_text())
    assert (config["stem"], config["epochs"], config["lr"]) == ("imagenet", 2, 0.06)
    assert len(list((tmp_path / "out/bank/train/red").iterdir())) == 14

    files = [tmp_path / "out" / name for name in ("moco-0/run.json", "random-0/knn/results.json")]
    done = [path.stat().st_mtime_ns for path in files]
    assert cifar10.main(words) == 0
    assert capsys.readouterr().out == text
    assert done == [path.stat().st_mtime_ns for path in files]

    folder = tmp_path / "stopped"
    stopped = [*words, "--methods", "moco", "--output-dir", str(folder)]
    for pairs in (["max_steps", "1"], []):  # the run goes on: another checkpoint
        assert cifar10.main([*stopped, *pairs]) == 0
        voted = json.loads((folder / "moco-0/knn/results.json").read_text())["checkpoint"]
        run = json.loads((folder / "moco-0/run.json").read_text())
        assert voted["sha256"] == sha256(folder / "moco-0" / run["checkpoint"])
    assert run["steps"] == 4

    with pytest.raises(UserError, match=r"main_moco\.py ended with status 2"):  # other keys
        cifar10.main([*words, "epochs", "3"])
    assert (tmp_path / "out/cifar10.md").read_text() == text


def test_means_stand_with_their_spread():
    rows = [{"method": "moco", "seed": i, "knn_after": 40.0 + i} for i in range(3)]
    assert "| moco | 3 | – | 41.00 ± 1.00 | – |" in cifar10.table(rows)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gone"], "want train/CLASS"),
        (["gone", "--methods", "mocco"], "methods of moco"),
        (["gone", "--seeds", "0"], "seeds 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, line, tmp_path):
    with pytest.raises(UserError, match=line):
        cifar10.main([*words, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out/bank").exists()
