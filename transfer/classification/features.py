"""Frozen features of an image set, computed once.

Legend: N: images of a set; B: of a batch; S: side of an image, px; D: width of a feature (2048 for
a ResNet-50's res5).
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, linear
from torch.utils.data import Dataset
from torchvision.transforms import functional

from convert.backbone import (
    RANDOM,
    Backbone,
    load_backbone,
    random_backbone,
    weights_digest,
)
from convert.errors import UserError
from convert.facts import Options
from convert.files import atomic_write, write_json
from convert.pixels import Pixels
from convert.progress import Progress
from convert.resnets import ARCHS
from pretrain import distributed
from pretrain.on_pillow import augment
from pretrain.sources import ImageList
from pretrain.views import Augmentation
from pretrain.workers import load, watched
from transfer.classification.request import (
    HEAD_SOURCES,
    STAGES,
    ProbeConfig,
    Request,
    require_one_of,
    split_source,
)

CACHE_VERSION = 2  # raise it when the same key would hold other numbers
GPU_WORKERS = 8
IMAGES_AT_ONCE = {"cpu": 64, "cuda": 256}  # more is no faster, and costs memory
BROKEN_NAMED = 3  # of the images that cannot be decoded
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
        stage: where the feature is taken, a word of `ProbeConfig.stage`.
        device: where it runs.
        beside: more such places, whose features come from the same forward pass.
        precision: fp32, or bf16 for the convolutions; pooling and the head are fp32 in both.

    Attributes:
        sources: all places, `stage` first.

    Raises:
        UserError: a feature of the head is wanted, and the checkpoint's head is not known.
    """

    def __init__(
        self,
        backbone: Backbone,
        stage: str,
        device: torch.device,
        beside: Sequence[str] = (),
        precision: str = "fp32",
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.stage, self.precision = stage, precision
        self.sources = tuple(dict.fromkeys((stage, *beside)))
        resnet: Any = backbone.build()
        self.resnet = resnet.requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        taken = [split_source(source)[0] for source in self.sources]
        depth = max(STAGES.index("res5" if s in HEAD_SOURCES else s) for s in taken)
        stages = enumerate(STAGES[: depth + 1], start=1)
        self.layers = {stage: getattr(resnet, f"layer{i}") for i, stage in stages}
        wants_head = [s for s in taken if s in HEAD_SOURCES]
        self.head = _read_head(backbone, wants_head[0], device) if wants_head else {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of normalised images (B, 3, S, S), on this device."""
        return self.look(images)[self.stage]

    @torch.no_grad()
    def look(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features (B, D) of every source from one pass over the images."""
        parts = images.split(IMAGES_AT_ONCE[self.device.type])
        moved = (part.to(self.device, memory_format=torch.channels_last) for part in parts)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 means fp32
            found = [self._look(part) for part in moved]
        return {source: torch.cat([part[source] for part in found]) for source in self.sources}

    def _look(self, images: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with bf16:
            x = self.stem(images)
        for stage, layer in self.layers.items():
            with bf16:
                x = layer(x)
            for source in self.sources:
                name, cells = split_source(source)
                if name == stage:
                    found[source] = adaptive_avg_pool2d(x.float(), cells).flatten(1)
        return found | self._heads_features(x)

    def _heads_features(self, x: Tensor) -> dict[str, Tensor]:
        """Return what the head makes of the last stage's output, where that is asked for."""
        wanted = [source for source in self.sources if source in HEAD_SOURCES]
        if not wanted:
            return {}
        value = adaptive_avg_pool2d(x.float(), 1).flatten(1)
        found = {}
        if "fc.0.weight" in self.head:
            value = linear(value, self.head["fc.0.weight"], self.head["fc.0.bias"]).relu()
            found["hidden"] = value
        last = "fc.2" if found else "fc"
        found["output"] = linear(value, self.head[f"{last}.weight"], self.head[f"{last}.bias"])
        return {source: found[source] for source in wanted}

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
        resize: int | None = None,
    ) -> None:
        self.images = images
        self.image_size, self.resize = config.image_size, resize or config.resize
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
        """Yield images (B, 3, S, S) and labels (B,) in the order of `items`.

        Raises:
            UserError: images of a batch cannot be decoded.
        """
        for batch in self.read(in_batches(items, batch_size), device, workers):
            if isinstance(batch, Broken):
                raise batch.error()
            yield batch

    def read(
        self, batches: Sequence[Sequence[Item]], device: torch.device, workers: int
    ) -> "Iterator[tuple[Tensor, Tensor] | Broken]":
        """Yield the images and labels of each batch, or what is wrong with its broken images."""
        yield from load(self, batches, workers, _collate, pin_memory=device.type == "cuda")


@dataclass(frozen=True)
class Broken:
    """Images that cannot be decoded: one line for each."""

    lines: tuple[str, ...]

    def error(self) -> UserError:
        """Count and name them in one line."""
        lines = dict.fromkeys(self.lines)  # an image may be drawn twice
        if len(lines) == 1:
            return UserError(next(iter(lines)))
        named = "; ".join(line.split(": cannot")[0] for line in [*lines][:BROKEN_NAMED])
        more = ", ..." if len(lines) > BROKEN_NAMED else ""
        return UserError(
            f"{len(lines)} images cannot be decoded: {named}{more}; mend or remove them, since "
            "without them the number would be another"
        )


def in_batches(items: Sequence[Item], batch_size: int) -> list[Sequence[Item]]:
    """Cut items into batches, the last one as short as it comes."""
    return [items[first : first + batch_size] for first in range(0, len(items), batch_size)]


def look_together(
    network: FrozenNetwork, views: Views, batches: Sequence[Sequence[Item]], workers: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the features of whole batches, of which each process sees its share of the images.

    Every process gets the same: all features in the order of the items, each image once, whatever
    the number of processes.

    Args:
        network: the backbone.
        views: the images.
        batches: items, the same on every process.
        workers: of this process, to read images.

    Yields:
        Source -> (B, D) on the network's device, and labels (B,) on the CPU.

    Raises:
        UserError: images cannot be decoded; the rest of this process's are read to count them.
    """
    shares = [_share(batch) for batch in batches]
    read = views.read(shares, network.device, workers)
    for batch, part in zip(batches, read, strict=True):
        if isinstance(part, Broken):
            rest = (more.lines for more in read if isinstance(more, Broken))
            raise Broken(sum(rest, part.lines)).error()
        with watched(workers):
            own = network.look(part[0])
        whole = {source: distributed.gather(value)[: len(batch)] for source, value in own.items()}
        yield whole, torch.tensor([views.images.labels[index] for _, index in batch])


def _share(batch: Sequence[Item]) -> list[Item]:
    """Return this process's part of a batch, as long as the others': the last one is repeated."""
    length = -(-len(batch) // distributed.size())
    first = distributed.rank() * length
    own = list(batch[first : first + length])
    return own + [batch[-1]] * (length - len(own))


def open_backbone(request: Request, seed: int) -> Backbone:
    """Read the checkpoint of a request; `random` is drawn anew from each seed.

    Raises:
        UserError: it cannot be read, or holds another network than `--arch` names.
    """
    if request.pretrained == RANDOM and request.arch is not None:
        require_one_of("--arch", request.arch, list(ARCHS))
        return random_backbone(request.arch, seed)
    said = Options.read(request.branch, request.pixels, request.stride_in_1x1)
    if request.pretrained == RANDOM and said != Options():
        raise UserError("--branch, --pixels, --stride-in-1x1: are of a checkpoint, not of random")
    backbone = load_backbone(request.pretrained, said, seed=seed)
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
    """Return the features of a set's test views at the network's stage; see `all_features`."""
    return all_features(network, images, config, request, what)[network.stage]


def all_features(
    network: FrozenNetwork,
    images: ImageList,
    config: ProbeConfig,
    request: Request,
    what: str,
    resize: int | None = None,
) -> dict[str, Features]:
    """Return the features of a set's test views, memory-mapped from the cache.

    What the cache lacks is computed in one pass and added to it. A file's name is the hash of
    everything that its numbers depend on: the weights' bytes, names, sizes and dates of the images,
    the view, the source, the precision, the kind of device. So every script finds it, and a stale
    one is never found.

    Args:
        network: the backbone on its device.
        images: the set.
        config: image size, and the cache's folder.
        request: the output folder, reading processes, quiet.
        what: the set's name for the progress line.
        resize: the shorter side of an image before its middle is cut out, px; None: the config's.

    Returns:
        Source -> features.
    """
    folder = Path(config.feature_cache) if config.feature_cache else request.output_dir / "features"
    resize = resize or config.resize
    keys = _cache_keys(network, images, [resize, config.image_size])
    names = {source: _hash(key) for source, key in keys.items()}
    paths = {source: folder / f"{name}.npy" for source, name in names.items()}
    found = {s: values for s, p in paths.items() if (values := _mapped(p, len(images))) is not None}
    # Processes must agree on what is to be computed, whoever wrote first.
    missing = [s for s in network.sources if distributed.agree(int(s not in found))]
    if not missing:
        shown = ", ".join(str(path) for path in paths.values())
        request.say(f"features of {what}: {len(images)} images, from {shown}")
    else:
        views = Views(images, config, network.backbone.facts.pixels, resize=resize)
        _compute({s: paths[s] for s in missing}, network, views, request, what)
        for source in missing:
            if distributed.rank() == 0:
                write_json(paths[source].with_suffix(".json"), keys[source])
        distributed.agree(0)  # all wait until the files are there
        found |= {source: _written(paths[source], len(images)) for source in missing}
    labels = torch.tensor(images.labels)
    return {source: Features(found[source], labels) for source in network.sources}


def _compute(
    paths: Mapping[str, Path],
    network: FrozenNetwork,
    views: Views,
    request: Request,
    what: str,
) -> None:
    """Write the features of some sources, each batch as it comes, on the first process.

    Not through a map of the file: of a full disk that would tell by SIGBUS.
    """
    images = len(views.images)
    items = [(0, index) for index in range(images)]
    workers = reading_processes(request.workers, network.device)
    at_once = IMAGES_AT_ONCE[network.device.type] * distributed.size()
    with (
        Progress(images, f"features of {what}", quiet=request.quiet) as progress,
        ExitStack() as stack,
    ):
        files: dict[str, Any] = {}
        for found, _ in look_together(network, views, in_batches(items, at_once), workers):
            for source, path in paths.items():
                value = found[source].cpu().numpy()
                if distributed.rank() == 0 and source not in files:
                    temporary = stack.enter_context(atomic_write(path))
                    files[source] = stack.enter_context(temporary.open("wb"))
                    header = npy.header_data_from_array_1_0(value)
                    shape = (images, value.shape[1])
                    npy.write_array_header_1_0(files[source], header | {"shape": shape})
                if distributed.rank() == 0:
                    files[source].write(np.ascontiguousarray(value).data)
            progress.add(len(next(iter(found.values()))))


def _cache_keys(
    network: FrozenNetwork, images: ImageList, view: list[int]
) -> dict[str, dict[str, Any]]:
    facts = network.backbone.facts
    dates = hashlib.sha256(repr([path.stat().st_mtime_ns for path in images.paths]).encode())
    key = {
        "version": CACHE_VERSION,
        "weights": weights_digest(network.backbone.weights),
        "network": [facts.arch, facts.stem, facts.stride_in_1x1],
        "listing": images.listing_hash(),
        "dates": dates.hexdigest(),
        "view": view,
        "pixels": asdict(facts.pixels),
        "precision": network.precision,
        "device": network.device.type,
    }
    head = weights_digest({k: v.cpu() for k, v in network.head.items()})
    return {
        source: key | {"source": source} | ({"head": head} if source in HEAD_SOURCES else {})
        for source in network.sources
    }


def _hash(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _mapped(path: Path, images: int) -> Tensor | None:
    """Map a file's features, (N, D), if it is there and whole; nobody writes through the map."""
    try:
        values = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError):  # absent, cut short or foreign: computed again
        return None
    whole = values.ndim == 2 and len(values) == images and values.dtype == np.float32
    return torch.from_numpy(values) if whole else None


def _written(path: Path, images: int) -> Tensor:
    values = _mapped(path, images)
    if values is None:
        raise UserError(
            f"{path}: the first process wrote it, and this one does not see it; name a folder that "
            "all processes share: feature_cache DIR"
        )
    return values


def _read_head(backbone: Backbone, source: str, device: torch.device) -> dict[str, Tensor]:
    """Return the head's tensors on a device, or say in one line that the source is not there."""
    head = backbone.head
    if not head or (source == "hidden" and "fc.0.weight" not in head):
        found = "a head of one layer, without a hidden one" if head else "no head that is known"
        raise UserError(
            f"checkpoint {backbone.facts.name}: feature '{source}': found {found}; want MoCo's own "
            "checkpoint (for hidden: v2's), or take res5"
        )
    return {name: tensor.to(device) for name, tensor in head.items()}


def _collate(items: list[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | Broken:
    broken = tuple(str(item) for item in items if isinstance(item, UserError))
    if broken:
        return Broken(broken)
    whole = [item for item in items if not isinstance(item, UserError)]
    return torch.stack([view for view, _ in whole]), torch.tensor([label for _, label in whole])
