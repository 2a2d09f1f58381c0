"""Fine-tune a detector on a converted checkpoint with Detectron2, and evaluate it.

examples:
  python transfer/train_net.py --config configs/coco_R50_C4_1x_moco.yaml --num-gpus 8
  python transfer/train_net.py --config configs/voc_R50_C4_24k_moco.yaml MODEL.WEIGHTS ckpt.pth
  python transfer/train_net.py --config configs/embedded_coco_R50_C4_moco.yaml MODEL.WEIGHTS ''
  python transfer/train_net.py --config X.yaml --train-data a.json:imgs/ --test-data b.json:imgs/
  python transfer/train_net.py --config X.yaml --train-data MYVOC:trainval --test-data MYVOC:test
  python transfer/train_net.py --config X.yaml --check-data          read all data, train nothing
  python transfer/train_net.py --config X.yaml --resume OUTPUT_DIR out        go on with a run
  python transfer/train_net.py --config X.yaml --num-gpus 2 --scale-to-gpus   by the linear rule
  python transfer/train_net.py --config X.yaml --accumulate 8                 one GPU as eight
  python transfer/train_net.py --config X.yaml --eval-only MODEL.WEIGHTS out/model_final.pth

Trailing KEY VALUE pairs override the recipe. COCO and VOC are found below $DETECTRON2_DATASETS.
"""

import importlib.util
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, UserError, run_script
from pretrain.config import join_resume

# Each user has a port of their own, as Detectron2 has it.
PORT = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
# Flags that are another spelling of a Detectron2 key.
KEYS = {
    "output_dir": "OUTPUT_DIR",
    "seed": "SEED",
    "device": "MODEL.DEVICE",
    "workers": "DATALOADER.NUM_WORKERS",
    "precision": "MOCO.PRECISION",
    "train_data": "DATASETS.TRAIN",
    "test_data": "DATASETS.TEST",
    "train_fraction": "MOCO.TRAIN_FRACTION",
    "split_seed": "MOCO.SPLIT_SEED",
    "accumulate": "MOCO.ACCUMULATE",
    "checkpoint_every": "MOCO.CHECKPOINT_EVERY",
    "keep": "MOCO.KEEP",
}


def parser() -> Parser:
    """Detectron2's own flags, and those that every script here shares."""
    words = Parser(__doc__ or "", prog="train_net.py")
    add = words.add_argument
    add("--config", "--config-file", required=True, type=Path, metavar="FILE", help="the recipe")
    add("--resume", metavar="auto|FILE", help="go on from this run's last checkpoint, or from FILE")
    add("--eval-only", action="store_true", help="measure a trained detector (MODEL.WEIGHTS)")
    add(
        "--train-data", action="append", metavar="SET", help="one's own: FILE.json:IMAGES, VOC:LIST"
    )
    add("--test-data", action="append", metavar="SET", help="the same, to measure on")
    add("--check-data", action="store_true", help="decode every image, say what is wrong, stop")
    add(
        "--train-fraction",
        type=float,
        metavar="F",
        help="of the training images, 0.01 for 1%%; nested",
    )
    add("--split-seed", metavar="N", help="which images a fraction has (default 0)")
    add("--num-gpus", type=int, default=1, help="processes on this machine (default 1)")
    add("--num-machines", type=int, default=1, help="machines (default 1)")
    add("--machine-rank", type=int, default=0, help="which of them this one is, from 0")
    add("--dist-url", default=f"tcp://127.0.0.1:{PORT}", help="where processes meet")
    add("--output-dir", metavar="DIR", help="default: output/detection/<recipe>/<weights>")
    add("--seed", metavar="N", help="fixes everything that is random")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--workers", metavar="N", help="processes that read images")
    add("--precision", choices=("fp32", "bf16"), help="default: the recipe's, which is fp32")
    add("--scale-to-gpus", action="store_true", help="batch, LR and schedule by the linear rule")
    add("--accumulate", metavar="N", help="take a batch in N parts: batch, LR, schedule stay")
    add("--checkpoint-every", metavar="N|Nm", help="iterations, or minutes as 5m")
    add("--keep", metavar="N", help="checkpoints to keep, 0: all (default: 1, till the end)")
    add("opts", nargs="*", metavar="KEY VALUE", help="override the recipe")
    return words


def main(argv: list[str] | None = None) -> int:
    """Parse, check, and hand over to transfer/detection/job.py."""
    words = join_resume(sys.argv[1:] if argv is None else argv)
    args = parser().parse_intermixed_args(words)
    if importlib.util.find_spec("detectron2") is None:
        raise UserError(
            "Detectron2 is not installed: run make install in the checkout, or pip install "
            "--no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
        )
    # Detectron2 takes seconds: --help does not wait for it.
    from transfer.detection import job as detection_job
    from transfer.detection import recipes

    flags = [(key, getattr(args, flag)) for flag, key in KEYS.items()]
    pairs = [
        word
        for key, value in flags
        if value is not None
        for word in (key, str(tuple(value) if isinstance(value, list) else value))
    ]
    cfg = recipes.load_recipe(args.config, [*pairs, *args.opts])
    if args.check_data:
        return detection_job.check_data(cfg, quiet=args.quiet)
    job = detection_job.prepare(
        cfg,
        resume=args.resume,
        eval_only=args.eval_only,
        quiet=args.quiet,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        scale_to_gpus=args.scale_to_gpus,
        recipe=args.config,
    )
    return detection_job.launch(
        job,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )


if __name__ == "__main__":
    run_script(main)
