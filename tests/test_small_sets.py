import json

import pytest

from benchmarks import small_sets
from convert.errors import UserError
from tests.small_sets import write_images, write_resnet18, write_voc


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_images(root / "colours", train=12, val=4)
    write_voc(root / "voc", [[("cat", 0)], [("dog", 0)], [("cat", 0), ("dog", 0)], []] * 8)
    write_resnet18(root / "resnet18.pth")
    return root


@pytest.mark.long
def test_a_row_a_checkpoint_and_a_column_a_set_and_protocol(made, tmp_path, capsys):
    words = ["--init", f"other={made / 'resnet18.pth'}", "--arch", "resnet18", "--seeds", "2"]
    words += ["--set", f"colours={made / 'colours'}", "--set", f"voc={made / 'voc'}"]
    words += [
        "--per-class",
        "colours=8,3",
        "--image-size",
        "32",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    # kNN's k = 20 needs 20 images in the bank: 3 classes of 8, nine tenths of them.
    assert small_sets.main([*words, "--quiet"]) == 0
    record = json.loads((tmp_path / "out/table.json").read_text())
    assert set(record["values"]) == {"random init", "other"}
    assert [len(values) for values in record["values"].values()] == [6, 6]
    assert all(len(each) == 2 for row in record["values"].values() for each in row)
    assert record["sets"]["colours"]["train"]["images"] == 24
    page = (tmp_path / "out/table.md").read_text()
    assert page == capsys.readouterr().out.removesuffix("\n")
    assert len([line for line in page.splitlines() if line.startswith("| ")]) == 4
    dates = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("results.json")}
    assert len(dates) == 12
    assert small_sets.main([*words, "--quiet", "--resume"]) == 0
    assert dates == {p: p.stat().st_mtime_ns for p in dates}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--set is missing"),
        (["--set", "colours"], "--set colours: want NAME=PATH"),
        (["--set", "a=b", "--init", "=x"], "--init =x: want NAME=PATH"),
        (["--set", "a=b", "--per-class", "c=1,1"], "--per-class c: want the name of a --set"),
        (["--set", "gone=nowhere"], "gone, random init, logreg mAP: logreg.py: images nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, line):
    with pytest.raises(UserError, match=line):
        small_sets.main([*words, "--output-dir", str(tmp_path), "--quiet"])
