"""Fine-tune the FCN on a checkpoint and measure its mean IoU; resumable to the bit.

Legend: B: images of one process; S: side of a crop, px; L: classes; W: processes.
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convert.backbone import Backbone
from convert.errors import Stopped, StopRequest, UserError
from convert.files import write_torch
from convert.progress import Progress
from pretrain import distributed
from pretrain.config import as_dict, load_config
from pretrain.norm import synchronise_norms
from pretrain.workers import load, watched
from transfer.classification.features import open_backbone, pick_device
from transfer.classification.request import Request, claim_folder, refuse_other_run
from transfer.results import name_recipe, write_results
from transfer.segmentation.config import SegmentationConfig
from transfer.segmentation.crops import Crops, Places, normalised
from transfer.segmentation.network import Fcn
from transfer.segmentation.scoring import Confusion
from transfer.segmentation.sets import IGNORED, Pairs, open_pairs

CHECKPOINT = "checkpoint.pth"
GPU_WORKERS = 8


class Run:
    """One seed of a fine-tuning: network, optimizer, and how far it is.

    Args:
        config: the protocol.
        backbone: what it starts from.
        pairs: the training split.
        seed: of crops, order and new layers.
        device: of this process.
    """

    def __init__(
        self,
        config: SegmentationConfig,
        backbone: Backbone,
        pairs: Pairs,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.seed, self.device, self.iteration = config, seed, device, 0
        network: nn.Module = Fcn(backbone, len(pairs.classes), seed)
        if distributed.size() > 1:
            network = synchronise_norms(network, device)
        self.network = network.to(device)
        parameters = list(self.network.parameters())
        self.averages = distributed.Averages(parameters, [])
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.pixels = backbone.facts.pixels
        assert len(config.scale) == 2
        scale = (config.scale[0], config.scale[1])
        self.crops = Crops(pairs, self.pixels, config.crop_size, scale, seed)

    @property
    def end(self) -> int:
        """The iteration to stop before."""
        return min(self.config.max_steps or self.config.iterations, self.config.iterations)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step on crops x (B, 3, S, S) and class numbers y (B, S, S); return the loss.

        The loss is the mean over the labelled pixels of all processes.
        """
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.iteration)
        with self._autocast():
            logits = self.network(x)
        total = functional.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")
        pixels = distributed.add_up((y != IGNORED).sum().to(total.dtype)).clamp(min=1)
        self.averages.clear()
        # The processes' gradients are averaged: W times each one's share makes their sum.
        (total * distributed.size() / pixels).backward()
        self.averages.average()
        self.optimizer.step()
        self.iteration += 1
        return distributed.add_up(total.detach()) / pixels

    def batches(self, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the crops of this process from the current iteration on."""
        places = Places(
            self.iteration,
            self.end,
            self.config.batch_size,
            distributed.rank(),
            distributed.size(),
        )
        pin = self.device.type == "cuda"
        for batch in load(self.crops, places, workers, _collate, pin_memory=pin):
            if isinstance(batch, UserError):
                raise batch
            x, y = batch
            yield (
                x.to(self.device, non_blocking=True),
                y.to(self.device, non_blocking=True),
            )

    @torch.no_grad()
    def score(self, pairs: Pairs, quiet: bool) -> Confusion:
        """Count the pixels of a split, each image whole, at its own size, by one process."""
        self.network.eval()
        confusion = Confusion(pairs.classes)
        with Progress(len(pairs), "evaluation", quiet=quiet) as progress:
            for index in range(distributed.rank(), len(pairs), distributed.size()):
                image, labels = pairs.read(index)
                x = normalised(image, self.pixels)[None].to(self.device)
                with self._autocast():
                    predicted = self.network(x)[0].argmax(0)
                confusion.add(predicted.cpu(), torch.from_numpy(labels.copy()))
                progress.add(distributed.size())
        confusion.counts = distributed.add_up(confusion.counts)
        return confusion

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Write all that a resume needs, on one process of all."""
        if distributed.rank():
            return
        content = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "identity": dict(identity),
        }
        write_torch(path, content)

    def resume(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            UserError: it cannot be read, or is another run's.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            before, iteration = content["identity"], int(content["iteration"])
        except Exception as error:  # torch.load has no closed list of what a damaged file raises
            raise UserError(f"--resume {path}: cannot be read, or is of another script") from error
        refuse_other_run(path, before, identity)
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.iteration = iteration

    def _autocast(self) -> torch.autocast:
        on = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)


def evaluate(config: SegmentationConfig, request: Request) -> dict[str, Any]:
    """Fine-tune and measure every seed, and write `results.json`.

    Args:
        config: the protocol.
        request: checkpoint, images, folders.

    Raises:
        UserError: bad input, a diverging loss, or an output folder in use.
        Stopped: a signal asked for it; what was done is saved.
    """
    started = time.time()
    device = pick_device(request.device)
    if config.batch_size % distributed.size():
        raise UserError(
            f"batch_size is {config.batch_size} for {distributed.size()} processes, want a multiple"
        )
    backbone = open_backbone(request, config.seed)
    train = open_pairs(config.layout, request.folder, config.train_split)
    val = open_pairs(config.layout, request.folder, config.val_split)
    identity = {
        **config.protocol(),
        "checkpoint": backbone.facts.sha256,
        "train": train.record()["listing"],
        "val": val.record()["listing"],
    }
    done = claim_folder(request, {**identity, "seed": config.seed, "seeds": config.seeds})
    request.say(f"segmentation: {backbone.facts.name} ({backbone.facts.method}), {device}")
    request.say(f"on {request.folder}: {len(train)} train and {len(val)} val images")
    request.say(f"output: {request.output_dir}{'' if done is None else ', already done'}")
    if done is not None:
        return done
    per_seed, per_class = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        again = backbone if seed == config.seed else open_backbone(request, seed)
        run = Run(config, again, train, seed, device)
        _train(run, request, {**identity, "seed": seed})
        confusion = run.score(val, request.quiet or distributed.rank() > 0)
        per_seed.append(confusion.metrics(config.layout))
        per_class.append(confusion.iou())
    if distributed.rank():
        return {"metrics": per_seed[0], "spread": {}}
    return write_results(
        request.output_dir,
        task=config.layout,
        per_seed=per_seed,
        protocol=config.protocol() | {"processes": distributed.size()},
        config=as_dict(config) | {"device": str(device)},
        checkpoint=backbone.facts.as_dict(),
        data={"train": train.record(), "val": val.record()},
        started=started,
        recipe=name_recipe(
            request.recipe.stem if request.recipe else "voc12_R50_FCN_30k",
            load_config(SegmentationConfig, request.recipe).protocol(),
            config.protocol(),
        ),
        details={"per_class": {f"{config.layout}/IoU": _mean_by_class(per_class)}},
    )


def _mean_by_class(per_seed: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for seed in per_seed for name in seed)
    values = {name: [seed[name] for seed in per_seed if name in seed] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def _train(run: Run, request: Request, identity: Mapping[str, Any]) -> None:
    """Bring a run to its end, from where an earlier one stopped."""
    folder = (
        request.output_dir if run.config.seeds == 1 else request.output_dir / f"seed_{run.seed}"
    )
    path = folder / CHECKPOINT
    named = request.resume not in (None, "auto")
    if named:
        run.resume(Path(str(request.resume)), identity)
    elif path.exists():
        if request.resume is None:
            raise UserError(
                f"{path}: a run that was not finished; go on with --resume, or choose another "
                "--output-dir"
            )
        run.resume(path, identity)
    quiet = request.quiet or distributed.rank() > 0
    workers = _workers(request, run.device)
    shown = Progress(run.end - run.iteration, "segmentation", "iteration", quiet=quiet)
    with watched(workers), StopRequest() as stop, shown:
        for x, y in run.batches(workers):
            loss = run.step(x, y)
            every = run.iteration % run.config.checkpoint_every == 0
            stopping = distributed.agree(stop.signum or 0)
            if every or stopping or run.iteration == run.end:
                _refuse_nan(loss, run)
                run.save(path, identity)
            if stopping and run.iteration < run.end:
                raise Stopped(stopping)
            shown.add(1, f"loss {loss:.3f}" if run.iteration % 20 == 0 else "")


def _refuse_nan(loss: Tensor, run: Run) -> None:
    if not torch.isfinite(loss):
        raise UserError(
            f"iteration {run.iteration}: the loss is {float(loss)} at lr "
            f"{run.config.lr_at(run.iteration - 1):g}; lower lr"
        )


def _workers(request: Request, device: torch.device) -> int:
    if request.workers is not None:
        return request.workers
    return min(GPU_WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0


def _collate(
    items: list[tuple[Tensor, Tensor] | UserError],
) -> tuple[Tensor, Tensor] | UserError:
    whole = []
    for item in items:
        if isinstance(item, UserError):
            return item
        whole.append(item)
    return torch.stack([x for x, _ in whole]), torch.stack([y for _, y in whole])
