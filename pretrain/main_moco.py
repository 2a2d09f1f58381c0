"""Pretrain a backbone with Momentum Contrast.

examples:
  python pretrain/main_moco.py
      MoCo v2 on the embedded images, small enough for a CPU
  python pretrain/main_moco.py DIR --mlp --moco-t 0.2 --aug-plus --cos
      MoCo v2 on DIR/train/CLASS/IMAGE.jpg, with the paper's settings
  python pretrain/main_moco.py DIR --config configs/pretrain/moco_v2_r50_200ep.yaml lr 0.015
      a recipe, and any of its keys as KEY VALUE
  python pretrain/main_moco.py PHOTOS --config configs/pretrain/moco_v2_r50_own.yaml
      your own images, in folders of any depth, a list, or .tar shards; K, m and length fit them
  torchrun --nproc-per-node 8 --max-restarts 3 pretrain/main_moco.py DIR
      one process a GPU; a group that lost a worker goes on by itself
  python pretrain/main_moco.py --report output/pretrain/moco_v1_resnet50
      the curves of a run, as a picture and a page; nothing is trained
"""

import os
import signal
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import UserError, run_script
from pretrain.flags import V2_COMMAND, Command, read_command


def main(argv: list[str] | None = None) -> int:
    """Parse, build, train, return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    for signum in (signal.SIGUSR1, signal.SIGUSR2):  # a scheduler's warnings end us as SIGTERM does
        signal.signal(signum, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    try:
        command = read_command(words, __doc__ or "")
    except UserError:
        if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
            return 2  # torchrun gives all processes the same words: the first one complains
        raise
    if command.report:
        from pretrain.curves import report

        print(*report(command.report), sep="\n")
        return 0
    # What torch's transport has to say is told in one line by the error that follows it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from pretrain import distributed
    from pretrain.checks import best_device

    device = best_device(command.config.device)
    launch = command.where()
    here = distributed.devices_here(device)
    if launch.spawn and here > 1 and not distributed.has_place():
        return distributed.run_children([sys.executable, __file__, *words], here, launch)
    with distributed.group(launch, device):
        return run(command)


def run(command: Command) -> int:
    """Train, as one of the processes of a group or alone."""
    from pretrain import checkpoint, distributed
    from pretrain.checks import check, check_alike
    from pretrain.faults import SKIPPED_NAME, open_usable, write_skipped
    from pretrain.loop import train
    from pretrain.monitor import open_knn
    from pretrain.presets import fit

    config, folder, say = command.config, command.output_dir, distributed.say
    images, val = open_usable(config, quiet=command.quiet)
    config, reasons = fit(config, len(images), command.given)
    say(f"{config.method}, {config.arch}, on {images.root} ({len(images)} images)")
    hint = "for MoCo v2 on it" if config.method == "MoCo v1" else "on a folder of your own"
    say(f"{hint}: {V2_COMMAND}", *command.notes, *reasons, sep="\n")
    resume = checkpoint.choose_resume(command.resume, folder, restarted=distributed.restarts() > 0)
    path = checkpoint.find_resume(resume, folder)
    config = check(config, len(images), checkpoint.settled_keys(path))
    check_alike(config, images=len(images), checkpoint=path)
    knn = open_knn(config, images, val)
    checkpoint.claim(folder, config, resume=path, asked=bool(resume))
    if distributed.rank() == 0:
        skipped = write_skipped(folder, images, val)
        if skipped:
            say(f"skipped {skipped} files that cannot be used: {folder / SKIPPED_NAME}")
    last = train(config, images, folder, resume=path, knn=knn, quiet=command.quiet)
    say(f"checkpoint: {last}\nnext: python convert/to_detectron2.py {last}")
    return 0


if __name__ == "__main__":
    run_script(main)
