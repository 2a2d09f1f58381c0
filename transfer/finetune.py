r"""Fine-tune a backbone end to end: ImageNet, iNaturalist-18, 1% and 10% of the labels.

  python transfer/finetune.py --pretrained ckpt.pth IMAGES
  python transfer/finetune.py --config configs/classification/finetune_inat18.yaml \
      --pretrained ckpt.pth INAT
  python transfer/finetune.py --config configs/classification/finetune_imagenet_1percent.yaml \
      --pretrained ckpt.pth IMAGES labels 1percent.txt
  python transfer/finetune.py --pretrained ckpt.pth IMAGES labels 10% bn frozen --epochs 30

IMAGES holds train/ and val/, one folder a class in each, or is a published set. `labels` names a
list of images (SimCLR's 1percent.txt) or a share of each class, drawn from the seed. Stopped or
killed, a run goes on with --resume and ends in the same bits.
Keys: labels, bn (tuned, frozen), batch_size, epochs, lr, head_lr, decay (step, cos), schedule,
momentum, weight_decay, image_size, seed, seeds.
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
    """Read the command line, fine-tune, print the result; return the exit status."""
    parser = Parser(__doc__)
    add_flags(parser)
    add = parser.add_argument
    add("-b", "--batch-size", type=int, metavar="N", help="of SGD (default: 256)")
    add("--epochs", type=int, metavar="N", help="default: 100")
    add("--lr", "--learning-rate", type=float, metavar="LR", dest="lr", help="default: 0.03")
    add("--schedule", type=int, nargs="*", metavar="N", help="epochs of lr / 10 (default: 70 90)")
    add("--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    add("--wd", "--weight-decay", type=float, metavar="W", dest="weight_decay", help="or 1e-4")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(join_resume(words))
    request, pairs = read_request(args, "finetune")

    from transfer.classification.finetuning import (  # torch: after --help and bad flags
        FinetuneConfig,
        evaluate,
    )

    config = load_config(FinetuneConfig, args.config, flags_of(FinetuneConfig, args), pairs)
    print(format_metrics(evaluate(config, request)))
    return 0


if __name__ == "__main__":
    run_script(main)
