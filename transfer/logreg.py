"""Logistic regression on frozen features: the linear suite of small sets.

  python transfer/logreg.py --pretrained ckpt.pth IMAGES
  python transfer/logreg.py --pretrained ckpt.pth DATA/dtd
  python transfer/logreg.py --pretrained ckpt.pth DATA/cifar-10-batches-py l2_values 12 --seeds 3

IMAGES holds train/ and val/ (or test/), one folder a class in each, or is a set as torchvision has
it on disk: CIFAR-10, CIFAR-100, Food-101, SUN397, Stanford Cars, FGVC Aircraft, DTD, Oxford Pets,
Caltech-101, Oxford Flowers, VOC2007. l2 is chosen on a validation part of the training images, the
fit is repeated on all of them, and only then is the test set judged: by accuracy, its mean over
classes, or 11-point mAP, whichever the set's protocol has (`metric auto`).
Keys: l2_values, max_iter, metric, apart, image_size, stage, seed, seeds, feature_cache.
"""

import sys
from argparse import Namespace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import run_script
from transfer.classification.launch import Parts, run_protocol


def main(argv: list[str] | None = None) -> int:
    """Read the command line, fit, print the result; return the exit status."""
    return run_protocol("logreg", __file__, __doc__, argv, parts)


def parts(_: Namespace) -> Parts:
    """Import the protocol."""
    from transfer.classification.logistic import LogisticConfig, evaluate

    return LogisticConfig, evaluate


if __name__ == "__main__":
    run_script(main)
