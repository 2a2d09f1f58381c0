r"""Classify by linear support vector machines on frozen features: VOC07 mAP, its low-shot curve.

  python transfer/svm.py --pretrained ckpt.pth VOCdevkit
  python transfer/svm.py --config configs/classification/svm_voc07.yaml \
      --pretrained ckpt.pth VOCdevkit
  python transfer/svm.py --pretrained ckpt.pth IMAGES low_shot 1,2,4,8 costs .01,.1,1

VOCdevkit holds VOC2007/{JPEGImages,Annotations,ImageSets/Main}: trainval is learnt from, test is
judged. IMAGES holds train/ and val/, one folder a class in each (Places, ImageNet), or a published
set. One machine a class, its cost chosen by cross-validation, all classes on all cores.
Keys: costs, folds, positive_weight, max_iter, difficult, low_shot, samples, jobs, image_size,
stage, seed, seeds, feature_cache.
"""

import sys
from argparse import Namespace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import run_script
from transfer.classification.launch import Parts, run_protocol


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train the machines, print the result; return the exit status."""
    return run_protocol("svm", __file__, __doc__, argv, parts)


def parts(_: Namespace) -> Parts:
    """Import the protocol."""
    from transfer.classification.svm import SvmConfig, evaluate

    return SvmConfig, evaluate


if __name__ == "__main__":
    run_script(main)
