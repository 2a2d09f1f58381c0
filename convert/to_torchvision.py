"""Write a checkpoint's backbone for torchvision and timm, or as safetensors.

examples:
  python convert/to_torchvision.py checkpoint_0199.pth.tar
  python convert/to_torchvision.py moco_v2.pkl moco_v2.safetensors
  python convert/to_torchvision.py model_final.pth --pixels caffe --stride-in-1x1 no

The suffix of the output decides its format; it stands beside the input unless it is named. In
Python: network.load_state_dict(torch.load("x.torchvision.pth", weights_only=True), strict=False)
for torchvision, timm.create_model("resnet50", num_classes=0, checkpoint_path="x.torchvision.pth").
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, run_script
from convert.to_detectron2 import add_source


def build_parser() -> Parser:
    """Build the command line."""
    parser = Parser(__doc__ or "")
    add_source(parser)
    parser.add_argument(
        "output", type=Path, nargs="?", help=".pth or .safetensors; default: NAME.torchvision.pth"
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite a different output")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, convert, print the report, return the exit status."""
    args = build_parser().parse_args(argv)
    import json

    from convert.export import describe, export
    from convert.facts import Options

    options = Options.read(args.branch, args.pixels, args.stride_in_1x1)
    report = export(
        args.checkpoint, args.output, options=options, force=args.force, quiet=args.quiet
    )
    print(json.dumps(report) if args.json else describe(report))
    return 0


if __name__ == "__main__":
    run_script(main)
