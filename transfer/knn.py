"""Classify by nearest neighbours among frozen features: no training, nothing to tune.

  python transfer/knn.py --pretrained ckpt.pth IMAGES
  python transfer/knn.py --pretrained ckpt.pth IMAGES k 20,200 temperature 0.1
  python transfer/knn.py --config configs/classification/knn_embedded.yaml --pretrained ckpt.pth
  python transfer/knn.py --config configs/classification/knn_embedded.yaml --pretrained random

IMAGES/train votes, IMAGES/val is judged, one folder a class in each, or IMAGES is a published set
(CIFAR, iNaturalist, Places); without IMAGES: the embedded digits. --seeds 1 is the exact protocol,
all training images in the bank; with more, each seed votes with another random 90% of them, for a
spread (and random init is drawn anew).
Keys: k, temperature, memory_mib, image_size, stage, seed, seeds, feature_cache.
"""

import sys
from argparse import Namespace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import run_script
from transfer.classification.launch import Parts, run_protocol


def main(argv: list[str] | None = None) -> int:
    """Read the command line, vote, print the result; return the exit status."""
    return run_protocol("knn", __file__, __doc__, argv, parts)


def parts(_: Namespace) -> Parts:
    """Import the protocol."""
    from transfer.classification.neighbors import KnnConfig, evaluate

    return KnnConfig, evaluate


if __name__ == "__main__":
    run_script(main)
