"""A classification script in one process or several: torchrun's, or the reference's own flags."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from pretrain.flags import LAUNCH_KEYS


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
