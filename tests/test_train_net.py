"""The script as a user types it, in processes of its own."""

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert.errors import UserError
from convert.files import ROOT
from tests.own_sets import coco_content, write_coco, write_image, write_voc
from transfer import train_net

SCRIPT = ROOT / "transfer" / "train_net.py"
VOC = ROOT / "configs" / "embedded_voc_R50_C4_moco.yaml"
SHARED = ROOT.parent / "shared" / "data"  # small photo sets beside the checkout; not ours to commit
COCO = ROOT / "configs" / "embedded_coco_R50_C4_moco.yaml"
# The embedded recipe at a size that shows the road and finds nothing.
TINY = [
    *("MODEL.WEIGHTS", ""),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4", "MODEL.RPN.POST_NMS_TOPK_TEST", "2"),
    *("SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("TEST.PRECISE_BN.NUM_ITER", "1", "SOLVER.MAX_ITER"),
]

needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="needs Detectron2"
)


def start(*words: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *words: object, cwd: Path, status: int = 0, timeout_s: float = 500, **environment: str
) -> tuple[str, str]:
    process = start(*words, cwd=cwd, **environment)
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    return out, err


def refusal(*words: object, cwd: Path, **environment: str) -> str:
    """Run something that a user must mend, and return the one line that says so."""
    _, err = run(*words, cwd=cwd, status=2, **environment)
    (line,) = [line for line in err.splitlines() if line.startswith("train_net.py: ")]
    assert err.splitlines()[-1] == line
    return line


def test_help_shows_an_example_without_waiting_for_heavy_imports() -> None:
    code = (
        "import sys; sys.argv = ['train_net.py', '--help']\n"
        "from transfer import train_net\n"
        "try: train_net.main()\n"
        "except SystemExit: print(sorted({'torch', 'detectron2', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--config configs/coco_R50_C4_1x_moco.yaml" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_detectron2s_own_flags_are_understood_in_any_order() -> None:
    words = (
        "SEED 3 --config-file c.yaml --num-gpus 2 SOLVER.MAX_ITER 9 --eval-only --num-machines 2"
    )
    more = "--machine-rank 1 --dist-url tcp://a:1"
    args = train_net.parser().parse_intermixed_args(f"{words} {more}".split())
    assert args.config == Path("c.yaml")
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (2, 2, 1)
    assert (args.dist_url, args.eval_only) == ("tcp://a:1", True)
    assert args.opts == ["SEED", "3", "SOLVER.MAX_ITER", "9"]


def test_without_detectron2_one_line_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(train_net.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"make install.*pip install"):
        train_net.main(["--config", str(VOC)])


def test_a_missing_recipe_flag_is_one_line(tmp_path) -> None:
    assert "--config" in refusal("SEED", 3, cwd=tmp_path)


@needs_detectron2
def test_the_command_of_the_readme_says_what_is_missing_and_leaves_nothing(tmp_path) -> None:
    line = refusal("--config", ROOT / "configs" / "coco_R50_C4_1x_moco.yaml", cwd=tmp_path)
    assert "output/weights.pkl: no such file" in line
    assert "python convert/to_detectron2.py ckpt.pth" in line
    assert "coco/annotations/instances_train2017.json is missing" in line
    assert "DETECTRON2_DATASETS" in line
    assert list(tmp_path.iterdir()) == []


@needs_detectron2
def test_a_mistake_ends_the_script_in_one_line(tmp_path) -> None:
    words = ["--config", VOC, "MODEL.WEIGHTS", "", "SOLVER.MAX_ITTER", 3]
    line = refusal(*words, cwd=tmp_path)
    assert line.startswith(
        "train_net.py: command line: unknown key 'SOLVER.MAX_ITTER'; known keys near it: SOLVER.MAX"
    )


@needs_detectron2
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "MODEL.WEIGHTS detectron2://x/R-50.pkl",
            "addresses are not fetched here; want a checkpoint's file, or one of moco_v1",
        ),
        (
            "MODEL.WEIGHTS detectron2://ImageNetPretrained/MSRA/R-50.pkl",
            "want a checkpoint's file, or its name msra_resnet50",
        ),
        ("MODEL.WEIGHTS gone.pth", "MODEL.WEIGHTS gone.pth: no such file"),
        ("MODEL.WEIGHTS garbage.pth", "garbage.pth: cannot be read"),
        ("MODEL.WEIGHTS garbage.pkl", "garbage.pkl: cannot be read"),
        ("MODEL.WEIGHTS cut.pkl", "cut.pkl: cannot be read"),
        ("RANDOM --num-gpus 3", "found 2 for 3 processes"),
        ("RANDOM OUTPUT_DIR /proc/x", "output folder /proc: cannot be written"),
        ("RANDOM --resume=gone.pth", "--resume gone.pth: no such checkpoint"),
        ("RANDOM MODEL.ROI_HEADS.NUM_CLASSES 20", "NUM_CLASSES: found 20, embedded_voc"),
        ("--eval-only MODEL.WEIGHTS gone.pth", "detector gone.pth: no such file"),
        ("--eval-only MODEL.WEIGHTS garbage.pth", "garbage.pth: cannot be read"),
        ("RANDOM SEED", "'SEED' has no value"),
        ("RANDOM --train-fraction 5", "MOCO.TRAIN_FRACTION: found 5.0, want above 0 and up to 1"),
        ("RANDOM MOCO.VOC_METRIC 2007", "MOCO.VOC_METRIC"),
        ("RANDOM --train-data gone.json:images --test-data VOC:all", "gone.json is missing; name"),
        (
            "RANDOM --train-data broken.json:images --test-data VOC:all",
            "its classes cannot be read",
        ),
        ("RANDOM --train-data VOC:all --test-data VOC:val", "want one of VOC:all, VOC:few"),
        (
            "RANDOM --train-data VOC:all --test-data own.json:images",
            "mouse only in own.json:images",
        ),
        (
            "RANDOM --train-data VOC:all --test-data VOC:few MODEL.ROI_HEADS.NUM_CLASSES 20",
            "NUM_CLASSES: found 20, the data have 2 (cat, dog); leave it out",
        ),
        ("RANDOM --accumulate 4", "found 2 for 1 processes of 4 parts each"),
        ("RANDOM --accumulate 0", "MOCO.ACCUMULATE: found 0, want 1 or more"),
        ("RANDOM --checkpoint-every 5h", "'5h': want iterations, as 500, or minutes, as 5m"),
        ("RANDOM --keep -1", "MOCO.KEEP: found -1, want 0 or more"),
        ("RANDOM DATALOADER.SAMPLER_TRAIN x", "SAMPLER_TRAIN: found 'x', want TrainingSampler"),
        ("RANDOM --scale-to-gpus MOCO.REFERENCE_GPUS 8", "2 is no multiple of the 8 GPUs"),
    ],
)
def test_what_a_user_can_mend_is_said(tmp_path, monkeypatch, words: str, complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("garbage.pth").write_bytes(b"not a checkpoint")
    Path("garbage.pkl").write_bytes(b"not a pickle")
    Path("broken.json").write_text('{"images": [')
    write_voc(tmp_path / "VOC")
    write_coco(tmp_path, coco_content(categories=[{"id": 1, "name": "mouse"}]))
    Path("cut.pkl").write_bytes(pickle.dumps({"model": {"stem.conv1.weight": [1.0]}})[:-4])
    pairs = words.replace("RANDOM", "MODEL.WEIGHTS EMPTY").split()
    with pytest.raises(UserError) as refused:
        train_net.main(["--config", str(VOC), *("" if w == "EMPTY" else w for w in pairs)])
    assert complaint in str(refused.value)


@needs_detectron2
def test_a_batch_that_cannot_fit_is_refused_before_the_first_iteration(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "4000", "OUTPUT_DIR", "out"]
    big = ["INPUT.MIN_SIZE_TRAIN", "(800,)", "INPUT.MAX_SIZE_TRAIN", "1333"]
    with pytest.raises(UserError, match=r"memory: an iteration needs about \d+.*\(now 4000;"):
        train_net.main(["--config", str(VOC), *words, *big])
    assert list(tmp_path.iterdir()) == []


@needs_detectron2
def test_check_data_lists_what_is_wrong_and_trains_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "VOC")
    own = ["--train-data", "VOC:all", "--test-data", "VOC:few", "--check-data"]
    assert train_net.main(["--config", str(VOC), *own]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data VOC:all: 3 images (1 without a box), 3 boxes, 2 classes",
        "data VOC:few: 1 images (0 without a box), 2 boxes, 2 classes",
        "data: nothing stops a run",
    ]
    write_image(tmp_path / "VOC" / "JPEGImages" / "two.jpg", 40, 50)
    with pytest.raises(UserError, match=r"data VOC:all: 1 of 3 images have another size .*40 x 50"):
        train_net.main(["--config", str(VOC), *own])
    (tmp_path / "VOC" / "JPEGImages" / "one.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"and 2 more kinds of fault\); --check-data lists all"):
        train_net.main(["--config", str(VOC), *own])
    said = capsys.readouterr().out
    assert "  stops a run: 1 of 3 images cannot be read: VOC/JPEGImages/one.jpg" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOC"]


@needs_detectron2
def test_a_run_refuses_data_that_do_not_fit_their_listing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "VOC")
    write_image(tmp_path / "VOC" / "JPEGImages" / "two.jpg", 40, 50)
    own = ["--train-data", "VOC:all", "--test-data", "VOC:few", "MODEL.WEIGHTS", ""]
    with pytest.raises(UserError, match=r"another size than listed: .*two\.jpg is 40 x 50, listed"):
        train_net.main(["--config", str(VOC), *own])
    assert not (tmp_path / "output").exists()


@needs_detectron2
def test_a_protocol_does_not_say_where_ones_own_data_lie(tmp_path) -> None:
    from transfer.detection import recipes

    protocols = []
    for place in ("here", "there"):
        name = f"{write_voc(tmp_path / place / 'VOC')}:all"
        pairs = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
        cfg = recipes.load_recipe(VOC, [*pairs, "MODEL.DEVICE", "cpu"])
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
        protocols.append(recipes.protocol(cfg, 1))
    assert protocols[0] == protocols[1]
    assert protocols[0]["DATASETS.TRAIN"] == ["VOC:all"]
    cfg.MOCO.TRAIN_FRACTION = 0.1
    assert recipes.protocol(cfg, 1) != protocols[0]


@needs_detectron2
@pytest.mark.slow
def test_mask_rcnn_trains_and_is_measured_and_measured_again(tmp_path) -> None:
    out, _ = run("--config", COCO, *TINY, 2, "--output-dir", "out", cwd=tmp_path)
    assert "weights: random init, seed 0" in out
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(record["metrics"]) == [
        f"coco/{kind}_AP{at}" for kind in ("box", "mask") for at in ("", "50", "75")
    ]
    assert record["task"] == "coco"
    assert record["checkpoint"]["method"] == "random init"
    assert record["data"]["train"]["images"] == 240
    assert record["protocol"]["MOCO.PRECISION"] == "bf16"
    assert record["protocol"]["norm"] == "SyncBN"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    kept = {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "detections.png"}
    assert names == kept | {"results.json", "curves.png", "tensorboard"}
    assert list(record["details"]["per_class"]["coco/mask_AP50"]) == ["digit"]
    assert record["recipe"]["name"] == "embedded_coco_R50_C4_moco"
    assert "SOLVER.MAX_ITER" in record["recipe"]["changed"]
    assert "MODEL.WEIGHTS" not in record["recipe"]["changed"]
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()
    ]
    assert {"iteration", "total_loss", "loss_mask", "lr"} <= lines[-1].keys()

    words = [*TINY[2:], 2, "--eval-only", "MODEL.WEIGHTS", "out/model_final.pth"]
    run("--config", COCO, *words, "--output-dir", "again", cwd=tmp_path)
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["metrics"] == record["metrics"]
    assert again["fingerprint"] == record["fingerprint"]
    line = refusal("--config", COCO, *words, "INPUT.FORMAT", "BGR", cwd=tmp_path)
    assert "INPUT.FORMAT BGR; set INPUT.FORMAT" in line
    other = coco_content(
        categories=[{"id": 3, "name": "cat"}],
        annotations=[
            {
                "id": 1,
                "image_id": 1,
                "category_id": 3,
                "bbox": [1, 1, 9, 9],
                "area": 81,
                "iscrowd": 0,
                "segmentation": [[1, 1, 9, 1, 9, 9]],
            }
        ],
    )
    line = refusal(
        "--config", COCO, *words, "--test-data", write_coco(tmp_path, other), cwd=tmp_path
    )
    assert "digit only in out/model_final.pth; cat only in" in line


@pytest.mark.long
@needs_detectron2
@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_what_was_begun(tmp_path) -> None:
    words = ["--config", VOC, *TINY, 12, "OUTPUT_DIR", "out"]
    process = start(*words, cwd=tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint_0000002.pth"
    until = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert err.splitlines()[-1] == "train_net.py: stopped by SIGINT"
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "results.json").exists()

    assert "holds another run" in refusal(*words, cwd=tmp_path)
    other = refusal(*words, "--resume", "SOLVER.BASE_LR", 0.1, cwd=tmp_path)
    assert "other settings (1; first SOLVER.BASE_LR" in other
    out, _ = run(*words, "--resume", cwd=tmp_path)
    assert "iterations of 2 images from" in out
    steps = [
        json.loads(x)["iteration"]
        for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()
    ]
    assert steps == list(range(12))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(record["metrics"]) == ["voc07/AP", "voc07/AP50", "voc07/AP75"]
    again, _ = run(*words, "--resume", cwd=tmp_path)
    assert "finished before" in again
    assert again.splitlines()[-1] == out.splitlines()[-1]


def small_coco(folder: Path, images: int) -> Path:
    """Arrange the small set as Detectron2 wants COCO, with so many images to evaluate on."""
    annotations = folder / "coco" / "annotations"
    annotations.mkdir(parents=True)
    small = SHARED / "coco_mini"
    for split in ("train2017", "val2017"):
        (folder / "coco" / split).symlink_to(small / split)
    train = "instances_train2017.json"
    (annotations / train).symlink_to(small / "annotations" / train)
    val = json.loads((small / "annotations" / "instances_val2017.json").read_text())
    val["images"] = val["images"][:images]
    kept = {image["id"] for image in val["images"]}
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] in kept]
    (annotations / "instances_val2017.json").write_text(json.dumps(val))
    return folder


@needs_detectron2
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder of small photo sets")
def test_the_readmes_pipeline_runs_at_the_published_size(tmp_path, moco_v2_file) -> None:
    convert = [sys.executable, ROOT / "convert" / "to_detectron2.py", moco_v2_file]
    done = subprocess.run(convert, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out, _ = run(
        *("--config", ROOT / "configs" / "coco_R50_C4_1x_moco.yaml", "--device", "cpu"),
        *("SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2, "TEST.PRECISE_BN.NUM_ITER", 2),
        cwd=tmp_path,
        timeout_s=3000,
        DETECTRON2_DATASETS=str(small_coco(tmp_path / "datasets", 4)),
    )
    assert "MoCo v2, epoch 200, checkpoint_0199.pth.tar" in out
    assert "265 of 265 backbone tensors landed" in out
    assert "2 iterations of 1 images, LR 0.02 after 1000 of warm-up" in out
    (file,) = tmp_path.glob("output/detection/coco_R50_C4_1x_moco/*/results.json")
    record = json.loads(file.read_text())
    assert record["data"]["test"]["images"] == 4
    assert {"coco/box_AP", "coco/mask_AP"} <= record["metrics"].keys()
    changed = {"SOLVER.IMS_PER_BATCH": 1, "SOLVER.MAX_ITER": 2, "SOLVER.STEPS": []}
    assert record["protocol"] | changed == record["protocol"]
    assert record["protocol"]["INPUT.MIN_SIZE_TRAIN"] == [640, 672, 704, 736, 768, 800]
