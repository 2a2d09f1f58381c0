"""Records of anybody, side by side under equal protocols only."""

import json
import subprocess
import time
from html import escape
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from benchmarks.records import read_record, read_registry, recipe_stem
from benchmarks.report import write_leaderboard
from benchmarks.standings import stand

V2 = {"name": "v2.pth.tar", "sha256": "aa" * 32, "method": "MoCo v2", "epoch": 200}
V2 |= {"arch": "resnet50"}
RANDOM = {"name": "random", "sha256": None, "method": "random init"}
PROTOCOL = {"SOLVER.MAX_ITER": 24000, "SOLVER.BASE_LR": 0.02, "INPUT.FORMAT": "RGB"}


def put(file: Path, start: dict[str, Any] = V2, ap: float = 57.0, **more: Any) -> Path:
    """Write a record of VOC detection as train_net writes it."""
    content = {
        "schema": 2,
        "task": "voc07",
        "metrics": {"voc07/AP50": ap + 25, "voc07/AP": ap},
        "per_seed": [{"voc07/AP50": ap + 25, "voc07/AP": ap}],
        "fingerprint": "f00",
        "protocol": PROTOCOL,
        "recipe": {"name": "voc_R50_C4_24k_moco", "changed": {}},
        "config": {"SEED": 0},
        "checkpoint": start,
        "data": {"test": {"names": ["voc_2007_test"], "images": 4952, "listing_hash": "1"}},
        "command": "python transfer/train_net.py",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content | more))
    return file


def table(folder: Path) -> Any:
    return stand(read_registry([folder]).records)


def test_seeds_of_several_records_are_one_cell(tmp_path):
    for seed, ap in enumerate((56.8, 57.1, 57.0)):
        put(tmp_path / str(seed) / "results.json", ap=ap, config={"SEED": seed})
    standings = table(tmp_path)
    assert len(standings.rows) == 1
    cell = standings.rows[0].cells[standings.columns[1]]
    assert cell.values == {0: 56.8, 1: 57.1, 2: 57.0}
    assert cell.spread.sd == pytest.approx(0.1528, abs=1e-4)
    assert cell.printed == 57.0
    assert cell.gap == pytest.approx(-0.0333, abs=1e-4)


def test_pixels_belong_to_the_checkpoint_and_split_no_column(tmp_path):
    put(tmp_path / "a/results.json")
    supervised = {"name": "R-50.pkl", "sha256": "bb" * 32, "method": "supervised, MSRA's"}
    put(
        tmp_path / "b/results.json",
        supervised,
        53.5,
        protocol=PROTOCOL | {"INPUT.FORMAT": "BGR"},
        recipe={"name": "voc_R50_C4_24k_supervised", "changed": {}},
    )
    standings = table(tmp_path)
    assert [column.title for column in standings.columns] == ["voc_R50_C4_24k"] * 2
    assert standings.mixed == []
    assert [row.method for row in standings.rows] == ["MoCo v2", "supervised"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"protocol": PROTOCOL | {"SOLVER.MAX_ITER": 9000}}, "SOLVER.MAX_ITER (24000 or 9000)"),
        ({"data": {"test": {"images": 4952, "listing_hash": "2"}}}, "data.test (1 or 2)"),
    ],
)
def test_another_protocol_or_other_data_is_another_column_and_is_named(tmp_path, more, named):
    put(tmp_path / "a/results.json")
    put(tmp_path / "b/results.json", RANDOM, **more)
    standings = table(tmp_path)
    assert standings.recipes == ["voc_R50_C4_24k [A]", "voc_R50_C4_24k [B]"]
    assert len(standings.mixed) == 1
    assert (
        "SOLVER.MAX_ITER (24000 or 9000)" in standings.mixed[0] or "data.test" in standings.mixed[0]
    )
    assert standings.against() == {}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            {"recipe": {"name": "voc_R50_C4_24k_moco", "changed": {"SOLVER.MAX_ITER": [24000, 9]}}},
            "changed: SOLVER.MAX_ITER is 9, the recipe's is 24000",
        ),
        (
            {"data": {"test": {"images": 40, "listing_hash": "1"}}},
            "other data: 40 test images, the published set has 4952",
        ),
    ],
)
def test_a_reduced_run_never_stands_beside_a_printed_number_unmarked(tmp_path, more, why):
    put(tmp_path / "run/results.json", **more)
    standings = table(tmp_path)
    cells = standings.rows[0].cells.values()
    assert all((cell.printed, cell.why_not) == (None, why) for cell in cells)
    html = write_leaderboard([tmp_path], tmp_path / "page").read_text()
    assert html.count('<td class="reduced"') == 2
    assert f"reduced, not the published protocol ({escape(why)})" in html
    assert "under the same protocol" not in html
    assert "not comparable" in html


def test_a_whole_run_stands_beside_what_its_authors_printed(tmp_path):
    for seed, ap in enumerate((56.9, 57.0, 57.1)):
        put(tmp_path / str(seed) / "results.json", ap=ap + 1, config={"SEED": seed})
    html = write_leaderboard([tmp_path], tmp_path / "page").read_text()
    cell = "58.0<br><small>± 0.1</small><br><small>+1.0</small>"
    assert f'<td class="above" title="printed: 57.0">{cell}' in html
    assert "Printed in the papers, under the same protocol" in html


def test_a_diverged_seed_is_flagged_on_the_page(tmp_path):
    for seed, ap in enumerate((57.0, 1.0, 57.1)):
        put(tmp_path / str(seed) / "results.json", ap=ap, config={"SEED": seed})
    html = write_leaderboard([tmp_path], tmp_path / "page").read_text()
    assert "1 of 3 diverged" in html
    assert "seed 1: 1.0" in html


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "no record"),
        ('{"schema": 2, "metrics": {}}', "holds no number"),
        ('{"schema": 2, "metrics": {"a/b": "high"}}', "a/b is 'high', which is no number"),
        ('{"schema": 2, "metrics": {"a/b": NaN}}', "which is no number"),
        ('{"schema": 99, "metrics": {"a/b": 1}}', "has version 99, this code reads up to"),
        ('{"schema": 2, "metrics": {"a/b": 1}, "per_seed": [3]}', "has 3 where numbers belong"),
    ],
)
def test_a_bad_record_is_named_and_left_out(content, why, tmp_path):
    put(tmp_path / "good/results.json")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/results.json").write_text(content)
    registry = read_registry([tmp_path])
    assert len(registry.records) == 1
    assert registry.holes[0].startswith("left out: bad/results.json: ")
    assert why in registry.holes[0]


def test_a_record_of_version_1_stays_readable(tmp_path):
    file = put(tmp_path / "results.json", schema=1)
    content = json.loads(file.read_text())
    del content["recipe"]
    file.write_text(json.dumps(content))
    record = read_record(file)
    assert (record.recipe, record.metrics["voc07/AP"]) == ("voc07", 57.0)
    assert stand([record]).rows[0].label == "MoCo v2, 200 ep (v2)"


def test_a_recipes_name_loses_only_what_it_starts_from():
    assert recipe_stem("coco_R50_C4_1x_moco") == "coco_R50_C4_1x"
    assert recipe_stem("voc_R50_C4_24k_random") == "voc_R50_C4_24k"
    assert recipe_stem("linear_imagenet") == "linear_imagenet"
    assert recipe_stem("pascal_voc_R_50_C4_24k_moco") == "voc_R50_C4_24k"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> tuple[Path, float]:
    """The page of a thousand records, and how long it took."""
    folder = tmp_path_factory.mktemp("thousand")
    for place in range(1000):
        start = V2 | {"name": f"run_{place:04d}.pth", "sha256": f"{place:064x}"}
        put(folder / f"runs/{place}/results.json", start, 50 + place % 97 / 10)
    hostile = V2 | {"name": "<script>boom()</script> 数字 " + "x" * 300, "sha256": "ff" * 32}
    put(folder / "runs/hostile/results.json", hostile, 12.3)
    began = time.monotonic()
    page = write_leaderboard([folder / "runs"], folder / "page")
    return page, time.monotonic() - began


def test_a_thousand_records_make_a_page_in_seconds(thousand):
    page, seconds = thousand
    assert seconds < 5
    html = page.read_text()
    assert "run_0999" in html
    assert "<script>boom" not in html
    assert page.stat().st_size < 4_000_000


@pytest.mark.skipif(not which("chromium"), reason="chromium is not installed")
def test_the_page_sorts_filters_and_compares_without_an_error(thousand, tmp_path):
    """A script of ours at the page's end clicks as a reader would and writes down what it sees."""
    clicks = """<script>
      window.onerror = message => { document.title = "ERROR " + message; };
      const table = document.querySelector("table.sortable.numbers");
      const rows = () => Array.from(table.tBodies[0].rows).filter(r => !r.className && !r.hidden);
      const head = table.tHead.rows[table.tHead.rows.length - 1].cells[2];
      const first = () => rows()[0].cells[2].firstChild.textContent;
      head.click(); const largest = first();
      head.click(); const smallest = first();
      const find = document.querySelector(".tools input");
      find.value = "run_0042"; find.dispatchEvent(new Event("input"));
      const found = rows().length;
      find.value = ""; find.dispatchEvent(new Event("input"));
      const [a, b] = rows(); a.click(); b.click();
      const compared = table.querySelector("tr.compared").textContent;
      document.body.replaceChildren(JSON.stringify({largest, smallest, found, compared}));
    </script>"""
    copy = tmp_path / "page.html"
    copy.write_text(thousand[0].read_text().replace("</body>", clicks + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = done.stdout.split("<body>")[1].split("</body>")[0]
    seen = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (seen["largest"], seen["smallest"], seen["found"]) == ("59.6", "12.3", 1)
    assert "minus" in seen["compared"]
    assert "-37.7" in seen["compared"]
