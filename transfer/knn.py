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
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from pretrain.config import join_resume, load_config
from transfer.classification.request import add_flags, flags_of, read_request
from transfer.results import format_metrics


def main(argv: list[str] | None = None) -> int:
    """Read the command line, vote, print the result; return the exit status."""
    parser = Parser(__doc__)
    add_flags(parser)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(join_resume(words))
    request, pairs = read_request(args, "knn")

    from transfer.classification.neighbors import (  # torch: after --help and bad flags
        KnnConfig,
        evaluate,
    )

    config = load_config(KnnConfig, args.config, flags_of(KnnConfig, args), pairs)
    print(format_metrics(evaluate(config, request)))
    return 0


if __name__ == "__main__":
    run_script(main)
