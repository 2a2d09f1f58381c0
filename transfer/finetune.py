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
from argparse import Namespace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from transfer.classification.launch import Parts, run_protocol
from transfer.classification.request import add_training_flags


def main(argv: list[str] | None = None) -> int:
    """Read the command line, fine-tune, print the result; return the exit status."""
    return run_protocol("finetune", __file__, __doc__, argv, parts, own_flags)


def own_flags(parser: Parser) -> None:
    """Add the flags of this script alone."""
    add_training_flags(parser, lr="0.03", schedule="70 90", weight_decay="1e-4")


def parts(_: Namespace) -> Parts:
    """Import the protocol."""
    from transfer.classification.finetuning import FinetuneConfig, evaluate

    return FinetuneConfig, evaluate


if __name__ == "__main__":
    run_script(main)
