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
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from pretrain.config import join_resume, load_config
from pretrain.flags import add_launch
from transfer.classification.launch import run_everywhere
from transfer.classification.request import Request, add_flags, flags_of, read_request
from transfer.results import format_metrics


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train and score the classifier; return the exit status."""
    parser = Parser(__doc__)
    add_flags(parser)
    add = parser.add_argument
    add("-b", "--batch-size", type=int, metavar="N", help="of SGD (default: 256)")
    add("--epochs", type=int, metavar="N", help="default: 100")
    add("--start-epoch", type=int, metavar="N", help="first epoch of a run without --resume")
    add("--lr", "--learning-rate", type=float, metavar="LR", dest="lr", help="default: 30")
    add("--schedule", type=int, nargs="*", metavar="N", help="epochs of lr / 10 (default: 60 80)")
    add("--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    add("--wd", "--weight-decay", type=float, metavar="W", dest="weight_decay", help="default: 0")
    add("--max-steps", type=int, metavar="N", help="stop after so many steps (default: never)")
    add("--grid", action="store_true", default=None, help="many classifiers in one pass; see above")
    add("-p", "--print-freq", type=int, metavar="N", help="steps between notes (default: 10)")
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
    add_launch(parser)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(join_resume(words))
    request, pairs = read_request(args, "linear")
    return run_everywhere(args, __file__, words, lambda: run(args, request, pairs))


def run(args: Namespace, request: Request, pairs: list[str]) -> int:
    """Train and score, as one of the processes of a group or alone."""
    from pretrain import distributed  # torch: after --help and bad flags
    from transfer.classification.heads import LinearConfig
    from transfer.classification.linear import evaluate

    config = load_config(LinearConfig, args.config, flags_of(LinearConfig, args), pairs)
    if args.spawn and args.nodes > 1:  # the reference's -b is each machine's
        config = replace(config, batch_size=config.batch_size * args.nodes)
        distributed.say(f"batch size {config.batch_size} on all {args.nodes} machines")
    request = replace(
        request,
        device=args.device,
        also_test=tuple(args.also_test),
        tensorboard=args.tensorboard and distributed.rank() == 0,
        quiet=request.quiet or distributed.rank() > 0,
    )
    distributed.say(format_metrics(evaluate(config, request, only_score=args.evaluate)))
    return 0


if __name__ == "__main__":
    run_script(main)
