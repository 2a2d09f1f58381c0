"""Convert a self-supervised checkpoint to a file that Detectron2 loads, proved equal.

examples:
  python convert/to_detectron2.py checkpoint_0199.pth.tar
  python convert/to_detectron2.py checkpoint_0199.pth.tar moco_v2.pkl --json

The output stands beside the input unless it is named, and output/weights.pkl, which the recipes in
configs/ name as MODEL.WEIGHTS, becomes a link to it.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser(__doc__ or "")
    parser.add_argument("checkpoint", type=Path, help="the checkpoint to convert")
    parser.add_argument("output", type=Path, nargs="?", help="default: the checkpoint's name, .pkl")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite a different output")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, convert, print the certificate, return the exit status."""
    args = build_parser().parse_args(argv)
    import json

    from convert.certificate import convert, describe

    certificate = convert(args.checkpoint, args.output, force=args.force)
    print(json.dumps(certificate) if args.json else describe(certificate))
    return 0


if __name__ == "__main__":
    run_script(main)
