r"""Fine-tune MoCo's FCN for semantic segmentation, and measure its mean IoU.

examples:
  python transfer/semseg.py VOCdevkit --pretrained ckpt.pth --seeds 5
  python transfer/semseg.py cityscapes --pretrained moco_v2_200ep \
      --config configs/segmentation/cityscapes_R50_FCN_90k.yaml
  torchrun --nproc-per-node 4 transfer/semseg.py ...        BN and gradients over all processes
  python transfer/semseg.py DIR --pretrained random lr 0.01 --seeds 5

Killed or stopped, the same command with --resume goes on, and ends in the same weights.
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from pretrain.config import join_resume, load_config
from transfer.classification.request import add_flags, flags_of, read_request
from transfer.results import format_metrics
from transfer.segmentation.config import SegmentationConfig


def main(argv: list[str] | None = None) -> int:
    """Read the command line, fine-tune and measure; return the exit status."""
    parser = Parser(__doc__ or "")
    add_flags(parser, "images and their classes: VOC 2012's or Cityscapes' folder")
    add = parser.add_argument
    add("-b", "--batch-size", type=int, metavar="N", help="over all processes (default: 16)")
    add("--iterations", type=int, metavar="N", help="default: 30000")
    add("--max-steps", type=int, metavar="N", help="stop after so many iterations")
    add("--lr", type=float, metavar="LR", help="default: 0.003")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(join_resume(words))
    request, pairs = read_request(args, "segmentation")
    config = load_config(SegmentationConfig, args.config, flags_of(SegmentationConfig, args), pairs)

    from pretrain.distributed import Launch, group  # torch: after --help and bad flags
    from transfer.classification.features import pick_device
    from transfer.segmentation.training import evaluate

    with group(Launch(), pick_device(request.device).type):
        record = evaluate(config, request)
    if os.environ.get("RANK", "0") == "0":
        print(format_metrics(record))
    return 0


if __name__ == "__main__":
    run_script(main)
