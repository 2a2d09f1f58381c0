"""Convert a self-supervised checkpoint to a file that Detectron2 loads, proved equal.

examples:
  python convert/to_detectron2.py checkpoint_0199.pth.tar
  python convert/to_detectron2.py swav_800ep_pretrain.pth.tar swav.pkl --json
  python convert/to_detectron2.py dino_resnet50_full.pth --branch student
  python convert/to_detectron2.py model_final.pth --pixels caffe --stride-in-1x1 yes
  python convert/to_detectron2.py anything.pth --describe

The output stands beside the input unless it is named, with a YAML of the settings that fit it, and
output/weights.pkl, which the recipes in configs/ name as MODEL.WEIGHTS, becomes a link to it.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser(__doc__ or "")
    add_source(parser)
    parser.add_argument("output", type=Path, nargs="?", help="default: the checkpoint's name, .pkl")
    parser.add_argument("--describe", action="store_true", help="say what it is, convert nothing")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite a different output")
    return parser


def add_source(parser: Parser) -> None:
    """Add the flags that name a checkpoint and say what it does not say itself."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a file of any supported layout, or a released name")
    add(
        "--branch",
        choices=("query", "key", "ema", "teacher", "student"),
        help="which encoder; default: the one that the method's authors evaluate",
    )
    add(
        "--pixels",
        metavar="P",
        help="what it expects of images: imagenet, unit (0..1), caffe (BGR), or ORDER:MEAN:STD",
    )
    add(
        "--stride-in-1x1",
        choices=("yes", "no"),
        help="whether a bottleneck's stride is in its first convolution, as in MSRA's",
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, convert, print the certificate, return the exit status."""
    args = build_parser().parse_args(argv)
    import json

    from convert.certificate import convert, describe, describe_source
    from convert.facts import Options

    options = Options.read(args.branch, args.pixels, args.stride_in_1x1)
    if args.describe:
        print(describe_source(args.checkpoint, options, as_json=args.json))
        return 0
    certificate = convert(args.checkpoint, args.output, options=options, force=args.force)
    print(json.dumps(certificate) if args.json else describe(certificate))
    return 0


if __name__ == "__main__":
    run_script(main)
