"""What a process of a group does in a test: `python tests/processes.py SPEC.json`, under torchrun's
environment. The spec has a list of jobs, each a config's changes, its dtype and number of steps."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.speed.reference_recipe import PlainMoCo, build, take_step
from pretrain import distributed
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.contrast import Batch
from pretrain.distributed import Launch
from pretrain.loader import Views, collate, on_device
from pretrain.loop import Run
from pretrain.sources import image_folder
from pretrain.views import AUGMENTATIONS


def loaded(run: Run, count: int) -> Iterator[list[torch.Tensor]]:
    """Load steps' views as the run would, in the default precision."""
    config = run.config
    augmentation = AUGMENTATIONS[config.augmentation]
    views = Views(run.images, augmentation, config.image_size, config.seed, run.model.views)
    dtype = torch.get_default_dtype()
    for _ in range(count):
        epoch = run.step // run.steps_per_epoch
        images = run.order.batch(run.step).view(distributed.size(), -1)[distributed.rank()]
        batch = collate([views[epoch, int(index)] for index in images])
        loaded_views = on_device(batch, run.device, config.image_size)
        yield [view.to(dtype) for view in loaded_views]
        run.step += 1


def take_steps(run: Run, count: int) -> list[list[float]]:
    """Take steps; return the means over the processes of loss and shares."""
    return [distributed.average(run.take_step(v)).tolist() for v in loaded(run, count)]


def take_plain_steps(run: Run, count: int) -> dict:
    """Take the same steps with the plain recipe; return what `do` does."""
    config = run.config
    model = PlainMoCo(config.arch, config.dim, config.K, config.m, config.tau, mlp=config.mlp)
    model.load_state_dict(run.model.state_dict())
    wrapped, optimizer = build(model, config.lr)
    values = []
    for views in loaded(run, count):
        shuffle = Batch([], run.order.batch(run.step), config.seed, run.step).shuffle(1)
        loss = take_step(wrapped, optimizer, views, shuffle)
        values.append(distributed.average(torch.tensor([loss])).tolist())
    return {"values": values, "state": model.state_dict()}


def do(job: dict, images: Path, folder: Path) -> dict:
    """Train as a job says; return the losses and the state, which all processes hold."""
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    listed = image_folder(images)
    config = check(PretrainConfig(**job["config"]), len(listed))
    run = Run(config, listed, folder, None)
    if job.get("plain"):
        return take_plain_steps(run, job["steps"])
    values = take_steps(run, job["steps"])
    state = run.model.state_dict()
    for name, tensor in state.items():  # bit for bit the same on each process
        rows = distributed.gather(tensor.reshape(1, -1).double())
        assert (rows == rows[:1]).all(), f"{name} differs between processes"
    return {"values": values, "state": state}


def main(spec: dict) -> None:
    torch.set_num_threads(1)
    folder = Path(spec["folder"])
    with distributed.group(Launch(timeout_s=120), "cpu"):
        for name, job in spec["jobs"].items():
            found = do(job, Path(spec["images"]), folder)
            if distributed.rank() == 0:
                torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
