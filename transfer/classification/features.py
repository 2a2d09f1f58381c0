"""Frozen features of an image set, computed once.

Legend: N: images of a set; B: of a batch; S: side of an image, px; D: width of a feature (2048 for
a ResNet-50's res5).
"""

import hashlib
import json
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from convert.backbone import (
    RANDOM,
    Backbone,
    load_backbone,
    random_backbone,
    weights_digest,
)
from convert.errors import UserError
from convert.files import atomic_write
from convert.pixels import Pixels
from convert.progress import Progress
from convert.resnets import ARCHS
from pretrain.on_pillow import augment
from pretrain.sources import ImageList
from pretrain.views import Augmentation
from transfer.classification.request import STAGES, ProbeConfig, Request, require_one_of

CACHE_VERSION = 1  # raise it when the same key would hold other numbers
GPU_WORKERS = 8
IMAGES_AT_ONCE = {"cpu": 64, "cuda": 256}  # more is no faster, and costs memory
Item = tuple[int, int]  # (epoch, index of the image)


@dataclass(frozen=True)
class Features:
    """Features of a set.

    Attributes:
        values: (N, D) float32. labels: (N,) int64 class indices.
    """

    values: Tensor
    labels: Tensor

    def take(self, places: Tensor) -> "Features":
        """Return the features at some places, (n,) int64."""
        return Features(self.values[places], self.labels[places])


class FrozenNetwork:
    """A backbone that only looks: no gradient, batch norm in eval mode (Sec. 4.1 of the paper).

    Args:
        backbone: the weights.
        stage: whose output is average-pooled, `res2` to `res5`.
        device: where it runs.
    """

    def __init__(self, backbone: Backbone, stage: str, device: torch.device) -> None:
        self.backbone = backbone
        self.device = device
        resnet: Any = backbone.build()
        self.resnet = resnet.requires_grad_(False).to(device, memory_format=torch.channels_last)
        stem = [resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool]
        stages = [getattr(resnet, f"layer{i + 1}") for i in range(STAGES.index(stage) + 1)]
        self.trunk = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(1)).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of normalised images (B, 3, S, S), on this device."""
        parts = images.split(IMAGES_AT_ONCE[self.device.type])
        moved = (part.to(self.device, memory_format=torch.channels_last) for part in parts)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 means fp32
            return torch.cat([self.trunk(part) for part in moved])

    def prove_unmoved(self) -> None:
        """Compare every tensor, running statistics included, with the weights read, bit by bit.

        Raises:
            RuntimeError: one differs, so whatever was measured is not about these weights.
        """
        now = {k: v.cpu() for k, v in self.resnet.state_dict().items()}
        if weights_digest(now) != weights_digest(self.backbone.weights):
            raise RuntimeError(
                "the frozen backbone changed during the evaluation; its number is void"
            )


class Views(Dataset[tuple[Tensor, int] | UserError]):
    """Images as the backbone wants them: test views, or augmented ones drawn from their place.

    An augmented view depends on (seed, epoch, index) alone, whatever the workers and wherever a
    run was stopped.
    """

    def __init__(
        self,
        images: ImageList,
        config: ProbeConfig,
        pixels: Pixels,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.image_size, self.resize = config.image_size, config.resize
        self.pixels = pixels
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, item: Item) -> tuple[Tensor, int] | UserError:
        """Return one view (3, S, S) and its class; what is wrong with a broken image is returned.

        An exception from a reading process would arrive as a traceback of many lines.
        """
        epoch, index = item
        try:
            image = self.images.read(index)
        except UserError as error:
            return error
        if self.augmentation is None:
            image = functional.center_crop(
                functional.resize(image, [self.resize]), [self.image_size, self.image_size]
            )
        else:
            draw = random.Random(f"{self.seed} {epoch} {index}")
            image = augment(image, self.augmentation, self.image_size, draw)
        view = functional.normalize(functional.to_tensor(image), self.pixels.mean, self.pixels.std)
        bgr = self.pixels.channel_order == "BGR"
        return (view.flip(0) if bgr else view), self.images.labels[index]

    def batches(
        self, items: Sequence[Item], batch_size: int, device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, 3, S, S) and labels (B,) in the order of `items`."""
        loader = DataLoader(
            self,
            batch_size=batch_size,
            sampler=items,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def open_backbone(request: Request, seed: int) -> Backbone:
    """Read the checkpoint of a request; `random` is drawn anew from each seed.

    Raises:
        UserError: it cannot be read, or holds another network than `--arch` names.
    """
    if request.pretrained == RANDOM and request.arch is not None:
        require_one_of("--arch", request.arch, list(ARCHS))
        return random_backbone(request.arch, seed)
    backbone = load_backbone(request.pretrained, seed=seed)
    if request.arch not in (None, backbone.facts.arch):
        found = f"checkpoint {request.pretrained}: holds a {backbone.facts.arch}"
        raise UserError(f"{found}, --arch wants {request.arch}; leave --arch out")
    return backbone


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best at hand.

    Raises:
        UserError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: want cpu or cuda") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= count:
        raise UserError(
            f"--device {device}: found {torch.cuda.device_count()} GPUs; try --device cpu"
        )
    return device


def reading_processes(workers: int | None, device: torch.device) -> int:
    """Say how many processes read images: none beside a CPU, whose cores the network fills."""
    if workers is None:
        return min(GPU_WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0
    return workers


def frozen_features(
    network: FrozenNetwork,
    images: ImageList,
    config: ProbeConfig,
    request: Request,
    what: str,
) -> Features:
    """Return the features of a set's test views, from the cache where it holds them.

    The cache's key is everything that the numbers depend on: the weights' bytes, names, sizes and
    dates of the images, the view, the stage, the kind of device.

    Args:
        network: the backbone on its device.
        images: the set.
        config: image size and stage, and the cache's folder.
        request: the output folder, reading processes, quiet.
        what: the set's name for the progress line.
    """
    key = _cache_key(network, images, config)
    folder = Path(config.feature_cache) if config.feature_cache else request.output_dir / "features"
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}.pt"
    cached = _read_cache(path, key)
    if cached is not None:
        request.say(f"features of {what}: {len(images)} images, from {path}")
        return cached
    features = _compute(network, images, config, request, what)
    with atomic_write(path) as temporary:
        torch.save({"key": key, "values": features.values, "labels": features.labels}, temporary)
    return features


def _compute(
    network: FrozenNetwork, images: ImageList, config: ProbeConfig, request: Request, what: str
) -> Features:
    views = Views(images, config, network.backbone.facts.pixels)
    items = [(0, index) for index in range(len(images))]
    workers = reading_processes(request.workers, network.device)
    at_once = IMAGES_AT_ONCE[network.device.type]
    values = []
    with Progress(len(images), f"features of {what}", quiet=request.quiet) as progress:
        for batch, _ in views.batches(items, at_once, network.device, workers):
            values.append(network(batch).cpu())
            progress.add(len(batch))
    return Features(torch.cat(values), torch.tensor(images.labels))


def _cache_key(network: FrozenNetwork, images: ImageList, config: ProbeConfig) -> dict[str, Any]:
    pixels = asdict(network.backbone.facts.pixels)
    dates = hashlib.sha256(repr([path.stat().st_mtime_ns for path in images.paths]).encode())
    return {
        "version": CACHE_VERSION,
        "weights": weights_digest(network.backbone.weights),
        "listing": images.listing_hash(),
        "dates": dates.hexdigest(),
        "view": [config.resize, config.image_size],
        "pixels": json.loads(json.dumps(pixels)),
        "stage": config.stage,
        "device": network.device.type,
    }


def _read_cache(path: Path, key: dict[str, Any]) -> Features | None:
    try:
        saved = torch.load(path, weights_only=True)
        return Features(saved["values"], saved["labels"]) if saved["key"] == key else None
    except Exception:  # absent, cut short or foreign: it is computed again and replaced
        return None


def _collate(
    items: list[tuple[Tensor, int] | UserError],
) -> tuple[Tensor, Tensor] | UserError:
    broken = next((item for item in items if isinstance(item, UserError)), None)
    if broken is not None:
        return broken
    whole = [item for item in items if not isinstance(item, UserError)]
    return torch.stack([view for view, _ in whole]), torch.tensor([label for _, label in whole])


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
