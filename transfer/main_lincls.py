r"""Linear classification: one layer trained on frozen features (MoCo, Sec. 4.1 and Table 1).

  python transfer/main_lincls.py --pretrained ckpt.pth IMAGES
  python transfer/main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained ckpt.pth IMAGES
  python transfer/main_lincls.py --pretrained ckpt.pth IMAGES features cached lr 3
  python transfer/main_lincls.py --pretrained ckpt.pth --resume OUT/checkpoint.pth.tar -e IMAGES
  python transfer/main_lincls.py --config configs/classification/linear_embedded.yaml \
      --pretrained ckpt.pth --seeds 3

IMAGES holds train/ and val/, one folder a class in each; without IMAGES: the embedded digits.
Why lr 30: features of contrastively trained networks are small (the paper's Sec. 4.1), so the
classifier's weights must grow large; features of another scale want another one.
Keys: features (augmented: the paper's protocol; cached: no augmentation, in seconds), standardize,
lr, schedule, epochs, momentum, weight_decay, batch_size, image_size, stage, seeds, feature_cache.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from pretrain.config import join_resume, load_config
from transfer.classification.request import add_flags, flags_of, read_request
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
    add("-p", "--print-freq", type=int, metavar="N", help="steps between notes (default: 10)")
    add(
        "-e",
        "--evaluate",
        action="store_true",
        help="only score the classifier that --resume names",
    )
    add("--gpu", type=int, metavar="ID", help="the same as --device cuda:ID")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(join_resume(words))
    if args.gpu is not None:
        args.device = f"cuda:{args.gpu}"
    request, pairs = read_request(args, "linear")

    from transfer.classification.heads import LinearConfig  # torch: after --help and bad flags
    from transfer.classification.linear import evaluate

    config = load_config(LinearConfig, args.config, flags_of(LinearConfig, args), pairs)
    print(format_metrics(evaluate(config, request, only_score=args.evaluate)))
    return 0


if __name__ == "__main__":
    run_script(main)
