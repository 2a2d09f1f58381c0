"""The main of a classification script, in one process or several.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from convert.errors import Parser
from pretrain.config import join_resume, load_config
from pretrain.flags import LAUNCH_KEYS, add_launch
from transfer.classification.request import Request, add_flags, flags_of, read_request
from transfer.results import format_metrics

# A protocol's config, and its function of a config and a request, which returns the record.
Parts = tuple[type, Callable[[Any, Request], dict[str, Any]]]


def run_protocol(
    task: str,
    script: str,
    description: str,
    words: Sequence[str] | None,
    parts: Callable[[Namespace], Parts],
    own_flags: Callable[[Parser], None] = lambda parser: None,
) -> int:
    """Read a command line, evaluate by a protocol, print its numbers.

    Args:
        task: `linear`, `knn`: the folder under `output/`.
        script: the file that other processes run too.
        description: for --help.
        words: the command line; None: this process's.
        parts: imports a protocol, which brings torch with it: after --help and bad flags.
        own_flags: adds the flags that this script has beside the common ones.

    Returns:
        The exit status.

    Raises:
        UserError: whatever the user can mend.
    """
    parser = Parser(description)
    add_flags(parser)
    own_flags(parser)
    add_launch(parser)
    words = sys.argv[1:] if words is None else words
    args = parser.parse_intermixed_args(join_resume([*words]))
    request, pairs = read_request(args, task)

    def evaluate() -> int:
        from pretrain import distributed

        kind, protocol = parts(args)
        config: Any = load_config(kind, args.config, flags_of(kind, args), pairs)
        if args.spawn and args.nodes > 1 and hasattr(config, "batch_size"):
            # The reference's -b is each machine's.
            config = replace(config, batch_size=config.batch_size * args.nodes)
            distributed.say(f"batch size {config.batch_size} on all {args.nodes} machines")
        here = replace(
            request,
            device=args.device,
            tensorboard=request.tensorboard and distributed.rank() == 0,
            quiet=request.quiet or distributed.rank() > 0,
        )
        record = protocol(config, here)
        if distributed.rank() == 0:
            print(format_metrics(record), flush=True)
        return 0

    return run_everywhere(args, script, words, evaluate)


def run_everywhere(
    args: Namespace, script: str, words: Sequence[str], run: Callable[[], int]
) -> int:
    """Run a script's work in this process, as one of its group, or start the group.

    Args:
        args: what a parser with `add_launch` read; `gpu` becomes `device`.
        script: the file that a process of the group runs.
        words: its command line.
        run: the work.

    Returns:
        The exit status.

    Raises:
        UserError: there is no such device, or the group does not form or loses a process.
    """
    # What torch's transport has to say is told in one line by the error that follows it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from pretrain import distributed
    from transfer.classification.features import pick_device

    if args.gpu is not None:
        args.device = f"cuda:{args.gpu}"
    device = pick_device(args.device)
    given = {key: getattr(args, key) for key in LAUNCH_KEYS} | {"gpu": device.index}
    launch = distributed.Launch(**given)
    here = distributed.devices_here(device.type)
    if launch.spawn and here > 1 and not distributed.has_place():
        return distributed.run_children([sys.executable, script, *words], here, launch)
    with distributed.group(launch, device.type):
        return run()
