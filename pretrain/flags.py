"""The command line of pretraining: the reference's flags, the house's, and keys of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import Parser, UserError
from pretrain.config import RECIPES, PretrainConfig, join_resume, load_config, split_words

if TYPE_CHECKING:
    from pretrain.distributed import Launch

DEFAULT_RECIPE = RECIPES / "moco_v2_r50_embedded.yaml"
V2_COMMAND = "python pretrain/main_moco.py DIR --mlp --moco-t 0.2 --aug-plus --cos"


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        config: the run's, defaults that depend on the machine not yet filled in.
        name: the recipe's.
        notes: what the flags changed, for people to read.
        output_dir, resume, quiet: the flags; resume is empty, auto or a file.
        launch: the flags that say how this process finds the others.
        report: draw this run's curves instead of training.
        given: the config's keys that the command line sets.
    """

    config: PretrainConfig
    name: str
    notes: tuple[str, ...]
    output_dir: Path
    resume: str
    quiet: bool
    launch: Mapping[str, Any]
    report: Path | None = None
    given: frozenset[str] = frozenset()

    def where(self) -> "Launch":
        """Return how this process finds the others."""
        from pretrain.distributed import Launch  # imports torch, which --help does not wait for

        return Launch(**self.launch)


def build_parser(description: str) -> Parser:
    """Build the command line. Defaults are the config's."""
    parser = Parser(description, argument_default=None)
    add = parser.add_argument
    add("words", nargs="*", metavar="DIR | KEY VALUE", help="the images; keys of the recipe")
    add("--config", type=Path, metavar="FILE", help="a recipe of configs/pretrain")
    add("--preset", metavar="auto", help="K, m, crops and length from the number of images")
    add("--output-dir", type=Path, metavar="DIR", help="default: output/pretrain/<recipe>")
    add("--resume", metavar="auto|FILE", help="go on from a checkpoint of this run")
    add("--init-from", metavar="FILE", help="start from a checkpoint's backbone, of any layout")
    add("-a", "--arch", help="a ResNet, by torchvision's name or the papers'")
    add("-j", "--workers", metavar="N", help="processes that load images, on each machine")
    add("--epochs", metavar="N")
    add("--start-epoch", metavar="N", help="begin as if N epochs were done")
    add("--max-steps", metavar="N", help="stop after N steps")
    add("-b", "--batch-size", metavar="N", help="images a step, on all processes")
    add("--accumulate", metavar="N", help="take each process's images in N parts")
    add("--bn-groups", metavar="N", help="batch norm groups over all processes")
    add("--lr", "--learning-rate", metavar="LR", help="at the recipe's batch size")
    add("--scale-lr", action="store_true", help="scale lr with a changed --batch-size")
    add("--schedule", nargs="+", dest="milestones", metavar="EPOCH", help="epochs of x0.1")
    add("--momentum", metavar="M", help="of SGD")
    add("--wd", "--weight-decay", dest="weight_decay", metavar="W")
    add("-p", "--print-freq", metavar="N", help="steps between log lines")
    add("--seed", metavar="N", help="fixes everything that is random")
    add("--device", help="cpu or cuda; default: the best at hand")
    add("--views", metavar="NAME", help="pillow, opencv or device; default: the fastest at hand")
    add("--precision", help="fp32 or bf16; default: the best at hand")
    add("--compile", action="store_true", default=None, help="compile the encoders")
    add("--checkpoint-every", metavar="N", help="steps, or minutes as 5m; default: every epoch")
    add("--keep", metavar="N", help="checkpoints kept; 0: all")
    add("--knn-dir", metavar="DIR", help="labelled train/ and val/ for kNN votes")
    add("--knn-every", metavar="N", help="epochs between the votes; default with --knn-dir: 1")
    add("--leak-meter", action="store_true", default=None, help="measure what batch norm tells")
    add("--report", type=Path, metavar="OUT", help="draw the curves of the run in OUT, and end")
    add("--moco-dim", dest="dim", metavar="C", help="length of an embedding")
    add("--moco-k", dest="K", metavar="K", help="keys in the queue")
    add("--moco-m", dest="m", metavar="m", help="momentum of the key encoder")
    add("--moco-t", dest="tau", metavar="T", help="temperature")
    add("--mlp", action="store_true", default=None, help="v2's head")
    add("--aug-plus", action="store_const", const="v2", dest="augmentation", help="v2's views")
    add("--cos", action="store_const", const="cos", dest="schedule", help="v2's schedule")
    add("--leak", action="store_true", default=None, help="allow a single batch norm group")
    add("--allow-small-set", action="store_true", default=None, help="allow K above the set's size")
    add_launch(parser)
    return parser


def add_launch(parser: Parser) -> None:
    """Add the flags that say where this process finds the others."""
    add = parser.add_argument_group("several processes (torchrun needs none of these)").add_argument
    add("--multiprocessing-distributed", action="store_true", dest="spawn", help="one a GPU")
    add("--world-size", type=int, default=-1, dest="nodes", metavar="N", help="machines")
    add("--rank", type=int, default=-1, dest="node", metavar="N", help="which one this is")
    add("--dist-url", default="", dest="url", metavar="URL", help="tcp://HOST:PORT")
    add("--dist-backend", default="", dest="backend", help="nccl or gloo")
    add("--dist-timeout", type=float, default=300.0, dest="timeout_s", metavar="S")
    add("--gpu", type=int, default=None, metavar="N", help="the device to use")


LAUNCH_KEYS = ("spawn", "nodes", "node", "url", "backend", "timeout_s", "gpu")


def read_command(argv: list[str], description: str = "") -> Command:
    """Read a command line.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type, no images.
    """
    args = vars(build_parser(description).parse_intermixed_args(join_resume(argv)))
    folder, pairs = split_words(args.pop("words"))
    launch = {key: args.pop(key) for key in LAUNCH_KEYS}
    output_dir, resume, quiet = (args.pop(key) for key in ("output_dir", "resume", "quiet"))
    scale_lr, recipe, report = (args.pop(key) for key in ("scale_lr", "config", "report"))
    for flag, given in (("--init-from", args["init_from"]), ("--resume", resume)):
        if given == "":  # as of a shell's variable that is not set
            raise UserError(f"{flag}: names no file; leave it out to start from random weights")
    if recipe is None and folder is None:
        recipe = DEFAULT_RECIPE
    if folder is not None:
        args["data"] = str(folder)
    config = load_config(PretrainConfig, recipe, args, pairs)
    if not config.data:
        raise UserError(f"no images: name a folder with train/ in it, as in {V2_COMMAND}")
    before = load_config(PretrainConfig, recipe).batch_size
    config, notes = _batch_of_all(config, launch, before, scale_lr=scale_lr)
    if config.knn_dir and not config.knn_every:
        config = replace(config, knn_every=1)
    name = recipe.stem if recipe else f"{config.method.lower().replace(' ', '_')}_{config.arch}"
    folder = output_dir or Path("output/pretrain") / name
    given = frozenset({key for key, value in args.items() if value is not None} | {*pairs[::2]})
    return Command(config, name, notes, folder, resume or "", quiet, launch, report, given)


def _batch_of_all(
    config: PretrainConfig, launch: Mapping[str, Any], before: int, *, scale_lr: bool
) -> tuple[PretrainConfig, tuple[str, ...]]:
    """Turn the reference's batch of a node into that of all, and scale the rate where asked."""
    notes = []
    nodes = launch["nodes"]
    if launch["spawn"] and nodes > 1:
        whole = config.batch_size * nodes
        notes.append(f"batch_size {config.batch_size} a node -> {whole} on {nodes} nodes")
        config = replace(config, batch_size=whole)
    if config.batch_size != before:
        scaled = config.lr * config.batch_size / before
        batch = f"batch_size {before} -> {config.batch_size}"
        if scale_lr:
            notes.append(f"{batch}: lr {config.lr:g} -> {scaled:g}")
            config = replace(config, lr=scaled)
        else:
            notes.append(f"{batch}: lr stays {config.lr:g} (--scale-lr: {scaled:g})")
    return config, tuple(notes)
