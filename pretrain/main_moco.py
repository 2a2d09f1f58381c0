"""Pretrain a backbone with Momentum Contrast.

examples:
  python pretrain/main_moco.py
      MoCo v2 on the embedded images, small enough for a CPU
  python pretrain/main_moco.py DIR --mlp --moco-t 0.2 --aug-plus --cos
      MoCo v2 on DIR/train/CLASS/IMAGE.jpg, with the paper's settings
  python pretrain/main_moco.py DIR --config configs/pretrain/moco_v2_r50_200ep.yaml lr 0.015
      a recipe, and any of its keys as KEY VALUE
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, UserError, run_script
from convert.files import write_json
from pretrain.config import (
    RECIPES,
    PretrainConfig,
    as_dict,
    join_resume,
    load_config,
    split_words,
)

DEFAULT_RECIPE = RECIPES / "moco_v2_r50_embedded.yaml"
V2_COMMAND = "python pretrain/main_moco.py DIR --mlp --moco-t 0.2 --aug-plus --cos"


def build_parser() -> Parser:
    """Build the command line: the reference's flags, and the house's. Defaults are the config's."""
    parser = Parser(__doc__ or "", argument_default=None)
    add = parser.add_argument
    add("words", nargs="*", metavar="DIR | KEY VALUE", help="the images; keys of the recipe")
    add("--config", type=Path, metavar="FILE", help="a recipe of configs/pretrain")
    add("--output-dir", type=Path, metavar="DIR", help="default: output/pretrain/<recipe>")
    add("--resume", metavar="auto|FILE", help="go on from a checkpoint of this run")
    add("-a", "--arch", help="a ResNet of torchvision")
    add("-j", "--workers", metavar="N", help="processes that load images")
    add("--epochs", metavar="N")
    add("--max-steps", metavar="N", help="stop after N steps")
    add("-b", "--batch-size", metavar="N", help="images a step")
    add("--lr", "--learning-rate", metavar="LR", help="at batch 256")
    add("--schedule", nargs="+", dest="milestones", metavar="EPOCH", help="epochs of x0.1")
    add("--momentum", metavar="M", help="of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", metavar="W")
    add("-p", "--print-freq", metavar="N", help="steps between log lines")
    add("--seed", metavar="N", help="fixes everything that is random")
    add("--device", help="cpu or cuda; default: the best at hand")
    add("--precision", help="fp32 or bf16; default: the best at hand")
    add("--checkpoint-every", metavar="N", help="steps, or minutes as 5m; default: every epoch")
    add("--keep", metavar="N", help="checkpoints kept; 0: all")
    add("--moco-dim", dest="dim", metavar="C", help="length of an embedding")
    add("--moco-k", dest="K", metavar="K", help="keys in the queue")
    add("--moco-m", dest="m", metavar="m", help="momentum of the key encoder")
    add("--moco-t", dest="tau", metavar="T", help="temperature")
    add("--mlp", action="store_true", default=None, help="v2's head")
    add("--aug-plus", action="store_const", const="v2", dest="augmentation", help="v2's views")
    add("--cos", action="store_const", const="cos", dest="schedule", help="v2's schedule")
    add("--leak", action="store_true", default=None, help="allow a single batch norm group")
    add("--allow-small-set", action="store_true", default=None, help="allow K above the set's size")
    return parser


def read_config(argv: list[str]) -> tuple[PretrainConfig, str, dict[str, object]]:
    """Read a command line: the config, the recipe's name, and what is no key of a config."""
    args = vars(build_parser().parse_intermixed_args(join_resume(argv)))
    folder, pairs = split_words(args.pop("words"))
    rest = {key: args.pop(key) for key in ("output_dir", "resume", "quiet")}
    recipe = args.pop("config")
    if recipe is None and folder is None:
        recipe = DEFAULT_RECIPE
    if folder is not None:
        args["data"] = str(folder)
    config = load_config(PretrainConfig, recipe, args, pairs)
    if not config.data:
        raise UserError(f"no images: name a folder with train/ in it, as in {V2_COMMAND}")
    name = recipe.stem if recipe else f"{config.method.lower().replace(' ', '_')}_{config.arch}"
    return config, name, rest


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, return the exit status."""
    config, name, rest = read_config(sys.argv[1:] if argv is None else argv)
    folder = Path(str(rest["output_dir"] or Path("output/pretrain") / name))
    from pretrain.checkpoint import claim
    from pretrain.loop import check, train
    from pretrain.monitor import KnnMonitor
    from pretrain.sources import open_set

    images, val = open_set(config.data)
    print(f"{config.method}, {config.arch}, on {images.root} ({len(images)} images)")
    hint = "for MoCo v2 on it" if config.method == "MoCo v1" else "on a folder of your own"
    print(f"{hint}: {V2_COMMAND}", flush=True)
    config = check(config, len(images))
    claim(folder, resume=bool(rest["resume"]))
    write_json(folder / "config.json", as_dict(config))
    bf16 = config.precision == "bf16"
    knn = KnnMonitor(images, val, config.image_size, bf16=bf16) if val else None
    resume, quiet = str(rest["resume"] or ""), bool(rest["quiet"])
    last = train(config, images, folder, resume=resume, knn=knn, quiet=quiet)
    print(f"checkpoint: {last}\nnext: python convert/to_detectron2.py {last}")
    return 0


if __name__ == "__main__":
    run_script(main)
