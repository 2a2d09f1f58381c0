import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.document import Document, Line, Section, Table, Text, to_html, to_markdown
from benchmarks.findings import gather
from benchmarks.plots import smooth
from benchmarks.report import write_report
from convert.errors import UserError
from convert.files import ROOT

CHANCE = math.log(1025)
NUMBERS = {
    "coco": {
        "coco/box_AP": 41.1,
        "coco/box_AP50": 76.2,
        "coco/box_AP75": 40.3,
        "coco/mask_AP": 38.4,
        "coco/mask_AP50": 74.5,
        "coco/mask_AP75": 36.6,
    },
    "voc": {"voc07/AP50": 78.7, "voc07/AP": 43.8, "voc07/AP75": 45.9},
    "linear": {"linear/top1": 91.6, "linear/top5": 99.3},
    "knn": {"knn20/top1": 93.7, "knn200/top1": 88.2},
}
SEEDS = {"linear": [-0.5, 0.0, 0.5], "knn": [-0.25, 0.0, 0.25]}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def put_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


MOCO = {"name": "checkpoint_0011.pth.tar", "sha256": "ab" * 32, "method": "MoCo v2", "epoch": 12}
RANDOM = {"name": "random", "sha256": None, "method": "random init"}
RECIPES = {
    "coco": "embedded_coco_R50_C4_moco",
    "voc": "embedded_voc_R50_C4_moco",
    "linear": "linear_embedded",
    "knn": "knn_embedded",
}


def record(task: str, shift: float, start: dict[str, Any] = MOCO) -> dict[str, Any]:
    numbers = NUMBERS[task]
    per_seed = [
        {key: value + shift + seed for key, value in numbers.items()}
        for seed in SEEDS.get(task, [0])
    ]
    columns = {key: [seed[key] for seed in per_seed] for key in numbers}
    several = len(per_seed) > 1
    return {
        "schema": 1,
        "task": {"voc": "voc07"}.get(task, task),
        "metrics": {key: statistics.fmean(column) for key, column in columns.items()},
        "spread": {k: statistics.stdev(column) for k, column in columns.items()} if several else {},
        "per_seed": per_seed,
        "fingerprint": f"0123{task}",
        "protocol": {"lr": 0.1, "task": task},
        "recipe": {"name": RECIPES[task], "changed": {}},
        "checkpoint": start,
        "config": {"seed": 0},
        "command": f"python {task}.py",
        "data": {"name": f"the {task} set", "train": {"images": 1347}, "val": {"images": 450}},
        "seconds": 61.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a suite leaves: a pretraining, a conversion, four measurements from two starts."""
    names = ["pretrain", "convert", *(f"{t}/{i}" for t in NUMBERS for i in ("moco", "random"))]
    job = {"state": "done", "status": 0, "reason": "", "seconds": 12.0, "key": "k", "log": "l"}
    jobs = [{"name": name, "command": f"python run.py {name}"} | job for name in names]
    environment = {
        "commit": "c0ffee",
        "versions": {"torch": "2.11.0", "detectron2": "sal-detectron2 0.7.2"},
        "hardware": {"cpu": "a CPU", "cores": 2, "gpus": []},
    }
    suite = {
        "suite": "quick",
        "typed": "quick",
        "parallel": 2,
        "cores": 2,
        "seconds": 611.0,
        "given": {},
    }
    put(tmp_path / "suite.json", suite | {"environment": environment, "jobs": jobs})
    steps = [{"step": s, "loss": CHANCE * (1 - s / 800)} for s in range(10, 401, 10)]
    votes = [{"step": 40 * e, "epoch": float(e), "knn_top1": 60.0 + e} for e in range(1, 11)]
    put_lines(tmp_path / "pretrain/log.jsonl", steps + votes)
    facts = {"method": "MoCo v2", "arch": "resnet50", "K": 1024, "images": 1200, "seconds": 171.0}
    put(tmp_path / "pretrain/run.json", facts | {"chance_loss": CHANCE, "loss_last_tenth": 4.3})
    put(
        tmp_path / "convert/certificate.json",
        {
            "source": "checkpoint_0011.pth.tar",
            "sha256": "ab" * 32,
            "arch": "resnet50",
            "method": "MoCo v2",
            "epoch": 12,
            "tensors": {"landed": 265, "expected": 265, "counters": 53, "dropped": 328},
            "proof": {
                "ran": True,
                "detectron2": "sal-detectron2 0.7.2",
                "c4": {"largest_difference": 9.5e-7, "scale": 3.2},
                "fpn": {"largest_difference": 1.1e-6, "scale": 3.4},
            },
            "pixels": {"channel_order": "RGB", "mean": [0.485], "std": [0.229]},
        },
    )
    for task in NUMBERS:
        for init, shift, start in (("moco", 0.0, MOCO), ("random", -2.0, RANDOM)):
            put(tmp_path / task / init / "results.json", record(task, shift, start))
            if task in ("coco", "voc"):
                curve = [{"iteration": i, "total_loss": 2 - i / 100} for i in range(60)]
                put_lines(tmp_path / task / init / "metrics.json", curve)
                Image.new("RGB", (8, 8)).save(tmp_path / task / init / "detections.png")
    return tmp_path


def page(folder: Path) -> str:
    return write_report(folder).read_text()


def without_pictures(text: str) -> str:
    return re.sub(r"data:image/[^\"]+", "", text)


def test_every_number_stands_in_page_markdown_and_json(folder):
    html = without_pictures(page(folder))
    markdown = (folder / "report.md").read_text()
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["MoCo v2, 12 ep (checkpoint_0011)", "random init"]
    numbers_of = [{cell["metric"]: cell for cell in row["cells"]} for row in rows]
    for task, numbers in NUMBERS.items():
        for metric, value in numbers.items():
            for row, shift in ((0, 0.0), (1, -2.0)):
                assert f"<td>{value + shift:.1f}" in html
                assert f"| {value + shift:.1f}" in markdown
                assert numbers_of[row][metric]["mean"] == pytest.approx(value + shift)
                seeds = len(SEEDS.get(task, [0]))
                assert numbers_of[row][metric]["seeds"] == seeds
    assert "± 0.5" in html  # the linear classifier's spread
    assert "91.6 ± 0.5" in markdown
    assert html.count("<td>+2.0</td>") == 13 + 4  # in the table; four again beside their test


def test_the_page_needs_no_other_file_and_no_network(folder):
    html = page(folder)
    sources = re.findall(r"""(?:src|href|srcset|action|data)=["']([^"']*)""", html)
    assert len([s for s in sources if s.startswith("data:image/")]) == 6
    assert all(s.startswith(("data:image/", "#")) for s in sources)
    assert not re.search(r"https?://|@import|url\(|<script .|<link|<iframe", without_pictures(html))
    assert html.count("<script") == 1  # its own


def test_the_page_names_what_a_cold_reader_needs(folder):
    html = without_pictures(page(folder))
    for words in (
        "265 of 265",
        "9.5e-07 at most",
        "1.1e-06 at most",
        "sal-detectron2 0.7.2",
        "Check: mean loss of the last tenth is 4.30, 38.0% under log(K+1) = 6.93",
        "not comparable",
        "53 hours on 8 V100 GPUs",
        "for 2 min 51 s on this machine",
        "python pretrain/main_moco.py /path/to/imagenet --mlp --moco-t 0.2 --aug-plus --cos",
        "python transfer/train_net.py --config configs/coco_R50_C4_1x_moco.yaml",
        "python benchmarks/suite.py ckpt.pth --suite quick",
        "python run.py knn/random",
        "0123linear",
        "the knn set (1,347, 450 images)",
        "commit c0ffee",
        "arXiv:1911.05722v3, Table 2b, Table 5c",
    ):
        assert words in html, words


def test_the_papers_rows_are_grey_and_have_their_numbers(folder):
    html = page(folder)
    grey = re.findall(r'<tr class="grey">(.*?)</tr>', html)
    row = next(row for row in grey if "MoCo v1, IN-1M, 200 ep" in row)
    numbers = re.findall(r"<td>(.*?)</td>", row)
    coco = ["38.5", "58.3", "41.6", "33.6", "54.8", "35.6"]
    assert numbers == [*coco, "81.5", "55.9", "62.6", "60.6", "–", "–", "–"]


def test_a_job_that_did_not_run_is_a_named_hole(folder):
    suite = json.loads((folder / "suite.json").read_text())
    for job in suite["jobs"]:
        if job["name"] == "coco/moco":
            job.update(state="failed", reason="status 1: out of memory")
    put(folder / "suite.json", suite)
    html = without_pictures(page(folder))
    assert "not run: coco/moco: failed (status 1: out of memory)" in html
    report = json.loads((folder / "report.json").read_text())
    ours, random = (
        {cell["metric"]: cell["mean"] for cell in row["cells"]} for row in report["rows"]
    )
    assert "coco/box_AP" not in ours  # a number left by an earlier run
    assert random["coco/box_AP"] == pytest.approx(39.1)
    assert "coco/box_AP" not in {pair["metric"] for pair in report["minus_random"]}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": {"coco/box_AP": "high"}}'])
def test_a_broken_record_is_named_and_left_out(folder, content):
    (folder / "coco/moco/results.json").write_text(content)
    assert "unreadable: coco/moco/results.json" in page(folder)


def test_a_suite_that_has_only_begun_makes_a_page_of_holes(folder):
    suite = json.loads((folder / "suite.json").read_text())
    for job in suite["jobs"]:
        job.update(state="waits")
    put(folder / "suite.json", suite)
    for name in ("pretrain/log.jsonl", "pretrain/run.json", "coco/moco/metrics.json"):
        (folder / name).unlink()
    html = page(folder)
    assert html.count("not run") > len(suite["jobs"])


def test_a_given_checkpoint_is_named_where_the_pretraining_would_stand(folder):
    suite = json.loads((folder / "suite.json").read_text())
    suite["given"] = {"checkpoint": "/data/mine.pth"}
    suite["jobs"] = [job for job in suite["jobs"] if job["name"] != "pretrain"]
    put(folder / "suite.json", suite)
    html = page(folder)
    assert "the checkpoint was given (<code>/data/mine.pth</code>)" in html
    assert "contrastive loss" not in html


def test_rows_of_different_protocols_are_marked(folder):
    other = record("voc", 0.0, RANDOM) | {"protocol": {"lr": 0.2, "task": "voc"}}
    put(folder / "voc/random/results.json", other)
    html = page(folder)
    assert "embedded_voc_R50_C4 was run under 2 protocols, A, B" in html
    assert "they differ in lr (0.1 or 0.2)" in html


def test_a_hostile_name_stays_text(folder):
    certificate = json.loads((folder / "convert/certificate.json").read_text())
    certificate["source"] = "<script>alert(1)</script> 数字 `|"
    put(folder / "convert/certificate.json", certificate)
    html = page(folder)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 数字" in html
    assert "<script" not in (folder / "report.md").read_text()


def test_a_resumed_curve_has_each_step_once_and_a_cut_line_is_skipped(folder):
    lines = [{"step": 10, "loss": 7.0}, {"step": 20, "loss": 6.0}, {"step": 20, "loss": 5.0}]
    put_lines(folder / "pretrain/log.jsonl", lines)
    with (folder / "pretrain/log.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    (folder / "pretrain/run.json").unlink()
    found = gather(folder).pretraining
    assert found is not None
    assert found.loss == [(10.0, 7.0), (20.0, 5.0)]
    assert found.last_tenth == 5.0


def test_the_moving_mean_of_a_line_is_the_line():
    line = [(float(x), 3.0 * x + 1) for x in range(200)]
    assert [y for _, y in smooth(line, 0.1)] == pytest.approx([y for _, y in line])


def test_numbers_by_class_are_drawn_where_a_record_has_them(folder):
    details = {"per_class": {"AP": {"cat": 60.0, "<b>dog</b>": 40.0, r"$\frac$": 20.0}}}
    put(folder / "voc/moco/results.json", record("voc", 0.0) | {"details": details})
    html = page(folder)
    assert "Faster R-CNN R50-C4, embedded scenes, VOC layout: AP of each class." in html
    figure = (folder / "figures/classes_embedded_voc_R50_C4.svg").read_text()
    assert "cat" in figure
    assert "<b>dog" not in figure + html


def test_html_and_markdown_tell_the_same():
    table = Table(["a", "b"], [Line(["x | y", "1\n± 2"]), Line(["whole"], "rule")], numbers=True)
    document = Document("T", [Text("say `<b>` & <i>")], [Section("S", [table])])
    html, markdown = to_html(document), to_markdown(document)
    assert "say <code>&lt;b&gt;</code> &amp; &lt;i&gt;" in html
    assert '<td colspan="2">whole</td>' in html
    assert "say `<b>` & &lt;i>" in markdown
    assert "| x \\| y | 1 ± 2 |" in markdown


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_a_folder_without_records_is_one_line(name, tmp_path):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/report.py", tmp_path / name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert re.search("no readable results.json|no such folder", done.stderr)
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    with pytest.raises(UserError):
        gather(tmp_path / name)


@pytest.mark.long
def test_the_script_writes_the_report_again_and_its_help_is_quick(folder):
    script = ROOT / "benchmarks/report.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.stdout == f"report: {folder}/report.html\n", done.stderr
    began = time.monotonic()
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert time.monotonic() - began < 1
    assert "python benchmarks/report.py output/benchmarks/quick" in done.stdout


def test_the_classifiers_own_log_is_no_pretraining(folder):
    (folder / "linear/moco/log.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    found = gather(folder).pretraining
    assert found is not None
    assert found.facts["method"] == "MoCo v2"
    assert "A MoCo v2 ResNet-50 was pretrained on 1,200 images" in page(folder)


def test_the_card_says_how_a_checkpoint_of_ours_was_made(folder):
    training = {"K": 65536, "m": 0.999, "tau": 0.2, "augmentation": "v2", "epochs": 200}
    for task in NUMBERS:
        start = MOCO | {"training": training | {"batch_size": 256}}
        put(folder / task / "moco/results.json", record(task, 0.0, start))
    made = "K = 65536, m = 0.999, tau = 0.2, augmentation v2, 200 epochs planned, batch 256"
    assert made in page(folder)
    put(folder / "knn/moco/results.json", record("knn", 0.0))
    assert "its file does not say" in page(folder)


def test_trials_share_a_panel_and_a_picture_and_a_table_row(folder):
    suite = json.loads((folder / "suite.json").read_text())
    for seed in (0, 1):
        name = f"voc.moco.seed{seed}"
        suite["jobs"].append({"name": name, "state": "done", "command": "python run.py"})
        shutil.copytree(folder / "voc/moco", folder / name)
    for word in ("results.json", "metrics.json", "detections.png"):
        (folder / "voc/moco" / word).unlink()
    put(folder / "suite.json", suite)
    findings = gather(folder)
    assert findings.place("voc.moco.seed1") == ("voc", "moco", 1)
    html = page(folder)
    pictures = re.findall(r"<figcaption>(Faster R-CNN[^<]*beside detections\.)", html)
    assert len(pictures) == 2  # one of moco's trials, one of random initialisation
    assert "from checkpoint_0011.pth.tar (MoCo v2, epoch 12) (seed 0)" in pictures[-1]
    names = re.findall(r"<!-- (.*?) -->", (folder / "figures/detectors.svg").read_text())
    assert names.count("Faster R-CNN R50-C4, embedded scenes, VOC layout") == 1


def test_rows_of_the_papers_say_who_fills_them(folder):
    suite = json.loads((folder / "suite.json").read_text())
    wants = {"arch": "resnet50", "method": "MoCo v1"}
    suite["tables"] = [
        {"table": "T 1", "row": "ours", "task": "linear, voc", "by": "moco", "wants": {}},
        {"table": "T 1", "row": "v1", "task": "linear", "by": None, "wants": wants},
    ]
    for job in suite["jobs"]:
        job |= {"reduced": {"epochs": "2"}} if job["name"] == "linear/moco" else {}
        job["state"] = "failed" if job["name"] == "voc/moco" else job["state"]
    put(folder / "suite.json", suite)
    html = page(folder)
    assert "<td>filled, reduced, 1 of 2 tasks</td>" in html
    assert "<td>open: wants another checkpoint</td><td>arch resnet50, method MoCo v1</td>" in html
    assert "Reduced: 1 of 10 jobs ran with settings of their recipes overridden (epochs 2)" in html


def test_a_number_that_no_paper_printed_is_marked_where_the_suite_overrode_it(folder):
    changed = {"name": "linear_embedded", "changed": {"bank": ["whole", "90%"]}}  # by its suite
    put(folder / "linear/moco/results.json", record("linear", 0.0) | {"recipe": changed})
    assert '<td class="reduced"' not in page(folder)
    suite = json.loads((folder / "suite.json").read_text())
    for job in suite["jobs"]:
        job |= {"reduced": {"epochs": "2"}} if job["name"] == "linear/moco" else {}
    put(folder / "suite.json", suite)
    html = page(folder)
    assert "reduced, not the recipe&#x27;s own protocol (overridden: epochs 2)" in html
    assert html.count('<td class="reduced"') == 2
