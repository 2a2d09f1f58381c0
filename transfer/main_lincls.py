r"""Linear classification: one layer trained on frozen features (MoCo, Sec. 4.1 and Table 1).

  python transfer/main_lincls.py --pretrained ckpt.pth IMAGES
  python transfer/main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained ckpt.pth IMAGES
  python transfer/main_lincls.py --pretrained ckpt.pth IMAGES features cached lr 3
  python transfer/main_lincls.py --pretrained ckpt.pth IMAGES --grid grid_features res4,res5
  python transfer/main_lincls.py --pretrained ckpt.pth IMAGES --also-test imagenet-r imagenet-c
  python transfer/main_lincls.py --pretrained ckpt.pth --resume OUT/checkpoint.pth.tar -e IMAGES
  torchrun --nproc-per-node 8 transfer/main_lincls.py --pretrained ckpt.pth IMAGES
  python transfer/main_lincls.py --config configs/classification/linear_embedded.yaml \
      --pretrained ckpt.pth --seeds 3

IMAGES holds train/ and val/, one folder a class in each; without IMAGES: the embedded digits.
Why lr 30: features of contrastively trained networks are small (the paper's Sec. 4.1), so the
classifier's weights must grow large; features of another scale want another one.
--grid trains many classifiers on the same forward pass, chooses one on a held-out tenth of the
training images, refitted on all of them, and reports it as linear_best beside the fixed protocol.
Keys: features (augmented: the paper's protocol; cached: no augmentation, in seconds), standardize,
lr, schedule, epochs, momentum, weight_decay, batch_size, image_size, stage, precision, seeds,
feature_cache, grid_lr, grid_weight_decay, grid_features, grid_held_out.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from transfer.classification.launch import Parts, run_protocol
from transfer.classification.request import add_training_flags


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train and score the classifier; return the exit status."""
    return run_protocol("linear", __file__, __doc__, argv, parts, own_flags)


def own_flags(parser: Parser) -> None:
    """Add the flags of this script alone."""
    add_training_flags(parser, lr="30", schedule="60 80", weight_decay="0")
    add = parser.add_argument
    add("--start-epoch", type=int, metavar="N", help="first epoch of a run without --resume")
    add("--max-steps", type=int, metavar="N", help="stop after so many steps (default: never)")
    add("--grid", action="store_true", default=None, help="many classifiers in one pass; see above")
    add(
        "-e",
        "--evaluate",
        action="store_true",
        help="only score the classifier that --resume names",
    )
    add(
        "--also-test",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="shifted test sets: ImageNet-V2, -R, -A, -Sketch, -C and folders like theirs",
    )
    add("--tensorboard", action="store_true", help="write OUT/tensorboard too")


def parts(args: Namespace) -> Parts:
    """Import the protocol."""
    from transfer.classification.heads import LinearConfig
    from transfer.classification.linear import evaluate

    return LinearConfig, partial(evaluate, only_score=args.evaluate)


if __name__ == "__main__":
    run_script(main)
