"""Checkpoints as their origins write them: the independent evidence for what `convert` recognises.

Each builder hangs torchvision's ResNet into a small copy of the origin's module tree, with the
origin's attribute names and wrappers, and nests its state dict among the things that the origin
saves beside it. Nothing here imports this project. Heads are small; names are the origin's.
`Origin.source` says where a layout was read.
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import pathlib
import pickle
import struct
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

State = dict[str, Tensor]
# Caffe's images, in RGB order and of 0..1, and its networks.
CAFFE = {
    "channel_order": "BGR",
    "mean": (123.675 / 255, 116.28 / 255, 103.53 / 255),
    "std": (1 / 255, 1 / 255, 1 / 255),
    "stride_in_1x1": True,
}


@dataclass
class Written:
    """What an origin hands to its writer, and what a reader should find.

    `backbones`: branch -> torchvision's names -> tensors; the first branch is the default one.
    `format`: torch, torch-legacy, safetensors, pickle. `facts`: expected values, where said.
    """

    content: Any
    backbones: dict[str, State]
    format: str = "torch"
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """One kind of file.

    `small`: the arch for tests that need no ResNet-50. `needs`: packages that its builder imports.
    `given`: what a user has to say, because the file does not and both kinds are common: the
    pixels (`imagenet` or `caffe`) and whether a bottleneck's stride is in its first convolution.
    """

    name: str
    slug: str
    source: str
    make: Callable[[str], Written]
    arch: str = "resnet50"
    small: str = "resnet18"
    needs: tuple[str, ...] = ()
    given: tuple[str, bool] | None = None

    def build(self, arch: str | None = None) -> Written:
        return self.make(arch or self.arch)


@dataclass(frozen=True)
class Refusal:
    """A file that must be refused: by `load_backbone`, or not before it is converted."""

    name: str
    source: str
    make: Callable[[], Written]
    words: str
    loads: bool = False
    needs: tuple[str, ...] = ()

    def build(self) -> Written:
        return self.make()


# ---- writing -----------------------------------------------------------------------------------


def write(written: Written, path: pathlib.Path) -> pathlib.Path:
    with _foreign_modules():
        if written.format == "pickle":
            path.write_bytes(_python2_pickle(written.content))
        elif written.format == "safetensors":
            path.write_bytes(_safetensors(written.content))
        else:
            legacy = written.format == "torch-legacy"
            torch.save(written.content, path, _use_new_zipfile_serialization=not legacy)
    return path


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    words = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, end = [], 0
    for name, tensor in state.items():
        flat = tensor.detach().contiguous().reshape(-1)
        blob = flat.view(torch.uint8).numpy().tobytes()
        offsets = [end, end + len(blob)]
        shape = list(tensor.shape)
        header[name] = {"dtype": words[tensor.dtype], "shape": shape, "data_offsets": offsets}
        blobs.append(blob)
        end = offsets[1]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(blobs)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one that can be changed
    """Writes text and bytes alike as Python 2's `str`, as files of Caffe2's time hold them."""

    dispatch = copy.copy(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def _string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        short = len(raw) < 256
        size = struct.pack("<B" if short else "<i", len(raw))
        self.write((pickle.SHORT_BINSTRING if short else pickle.BINSTRING) + size + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _string


def _python2_pickle(content: Any) -> bytes:
    file = bytearray()
    writer = types.SimpleNamespace(write=file.extend)
    _Python2Pickler(writer, protocol=2).dump(content)
    # NumPy 2 names a module that no older NumPy has.
    return bytes(file).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


# ---- objects of classes that a reader does not have --------------------------------------------

_FOREIGN: dict[tuple[str, str], Any] = {}


def foreign(path: str, base: type = object, **attributes: Any) -> Any:
    """Make an object whose class is importable only while a file is written."""
    module, _, name = path.rpartition(".")
    if (module, name) not in _FOREIGN:
        _FOREIGN[module, name] = type(name, (base,), {"__module__": module, "__qualname__": name})
    made = _FOREIGN[module, name]()
    made.__dict__.update(attributes)
    return made


def foreign_function(name: str) -> Any:
    """Make a function of the script that trained: a pickle holds its name in `__main__`."""

    def function(*_: Any) -> None: ...

    function.__module__, function.__qualname__, function.__name__ = "__main__", name, name
    return _FOREIGN.setdefault(("__main__", name), function)


@contextlib.contextmanager
def _foreign_modules() -> Iterator[None]:
    modules: dict[str, types.ModuleType] = {}
    with contextlib.ExitStack() as stack:
        for (module, name), made in _FOREIGN.items():
            if module == "__main__":
                patch = mock.patch.object(sys.modules[module], name, made, create=True)
                stack.enter_context(patch)
                continue
            parts = module.split(".")
            for path in (".".join(parts[: count + 1]) for count in range(len(parts))):
                modules.setdefault(path, types.ModuleType(path))
            setattr(modules[module], name, made)
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        yield


# ---- networks ----------------------------------------------------------------------------------


@lru_cache
def weights(arch: str, branch: str = "query", stem: str = "imagenet") -> State:
    """Give a network's tensors; other branches are cheap arithmetic on the query's."""
    if branch != "query":
        scale = {"key": 0.75, "third": 1.25}[branch]
        state = weights(arch, "query", stem)
        return {k: v * scale if v.is_floating_point() else v + 1 for k, v in state.items()}
    if stem == "cifar":
        small = {"conv1.weight": weights(arch)["conv1.weight"][:, :, 2:5, 2:5].contiguous()}
        return weights(arch) | small
    generator = torch.Generator().manual_seed(len(arch))
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)()
    shapes = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    return {k: _filled(k, v.shape, generator) for k, v in shapes.items()}


def _filled(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    if len(shape) == 4:
        return torch.randn(shape, generator=generator) * (2 / (shape[0] * shape[2] ** 2)) ** 0.5
    if name.endswith(("running_var", "weight")):
        return 0.5 + torch.rand(shape, generator=generator)
    return 0.1 * torch.randn(shape, generator=generator)


def network(arch: str, branch: str = "query", fc: nn.Module | None = None, **options: Any) -> Any:
    """Build torchvision's network around those tensors, without copying or initialising them."""
    stem = options.pop("stem", "imagenet")
    with torch.device("meta"):
        net = getattr(torchvision.models, arch)(**options)
        if stem == "cifar":
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    net.load_state_dict(weights(arch, branch, stem), strict=False, assign=True)
    net.fc = fc or nn.Identity()
    return net


def both(arch: str, first: str = "query", second: str = "key", stem: str = "imagenet") -> Any:
    return {first: weights(arch, "query", stem), second: weights(arch, "key", stem)}


def one(arch: str, stem: str = "imagenet") -> dict[str, State]:
    return {"query": weights(arch, "query", stem)}


def without_counters(state: State) -> State:
    zero = torch.tensor(0)
    return {k: zero if k.endswith("num_batches_tracked") else v for k, v in state.items()}


def width(arch: str) -> int:
    return 512 if arch in {"resnet18", "resnet34"} else 2048


def mlp(*sizes: int, norm: bool = False, last_norm: bool = False, bias: bool = True) -> Any:
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(itertools.pairwise(sizes)):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(wide, narrow, bias=bias))
        if norm and not last:
            layers.append(nn.BatchNorm1d(narrow))
        if not last:
            layers.append(nn.ReLU())
        elif last_norm:
            layers.append(nn.BatchNorm1d(narrow, affine=False))
    return nn.Sequential(*layers)


def tree(**children: Any) -> nn.Module:
    """Make a module out of modules and buffers, in the order given."""
    module = nn.Module()
    for name, child in children.items():
        if isinstance(child, Tensor):
            module.register_buffer(name, child)
        else:
            module.add_module(name, child)
    return module


def parallel(module: nn.Module) -> nn.Module:
    """DataParallel and DistributedDataParallel both hold what they wrap as `module`."""
    return tree(module=module)


def state(module: nn.Module) -> "OrderedDict[str, Tensor]":
    return OrderedDict(module.state_dict())


def queue(size: int = 32, dim: int = 8) -> dict[str, Tensor]:
    columns = nn.functional.normalize(torch.randn(dim, size), dim=0)
    return {"queue": columns, "queue_ptr": torch.zeros(1, dtype=torch.long)}


def optimizer() -> dict[str, Any]:
    group = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False, "params": [0]}
    return {"state": {0: {"momentum_buffer": torch.zeros(3, 3)}}, "param_groups": [group]}


def namespace(**entries: Any) -> argparse.Namespace:
    return argparse.Namespace(arch="resnet50", lr=0.03, schedule=[120, 160], gpu=None, **entries)


# ---- MoCo and what was made of it --------------------------------------------------------------


def moco(arch: str, *, v2: bool, format: str = "torch", facts: Any = None) -> Written:
    dim = width(arch)
    fc = (lambda: mlp(dim, 16, 8)) if v2 else (lambda: nn.Linear(dim, 8))
    model = tree(
        encoder_q=network(arch, "query", fc()), encoder_k=network(arch, "key", fc()), **queue()
    )
    content = {"epoch": 200, "arch": arch, "state_dict": state(parallel(model))}
    content["optimizer"] = optimizer()
    return Written(content, both(arch), format, {"epoch": 200} | (facts or {}))


def moco_cleaned(arch: str) -> Written:
    """What the released files keep: no solver, and the query encoder alone."""
    full = moco(arch, v2=True).content
    kept = {k: v for k, v in full["state_dict"].items() if k.startswith("module.encoder_q.")}
    content = {"epoch": 800, "arch": arch, "state_dict": OrderedDict(kept)}
    return Written(content, one(arch), "torch-legacy", {"epoch": 800})


def moco_cifar(arch: str) -> Written:
    def encoder(branch: str) -> nn.Module:
        children = []
        for module in network(arch, branch, nn.Linear(width(arch), 8), stem="cifar").children():
            if isinstance(module, nn.Linear):
                children.append(nn.Flatten(1))
            if not isinstance(module, nn.Identity):  # the max pool is left out, and not counted
                children.append(module)
        return tree(net=nn.Sequential(*children))

    model = tree(encoder_q=encoder("query"), encoder_k=encoder("key"), **queue())
    content = {"epoch": 200, "state_dict": state(model), "optimizer": optimizer()}
    pixels = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
    facts = {"epoch": 200, "stem": "cifar"} | pixels
    return Written(content, both(arch, stem="cifar"), facts=facts)


def msf(arch: str, container: str = "state_dict") -> Written:
    dim = width(arch)
    model = tree(
        # DataParallel wraps the parts, so its word stands in the middle of each name.
        encoder_q=parallel(network(arch, "query", mlp(dim, 16, 8, norm=True))),
        encoder_t=parallel(network(arch, "key", mlp(dim, 16, 8, norm=True))),
        predict_q=parallel(mlp(8, 16, 8, norm=True)),
        queue=torch.randn(32, 8),
        labels=torch.full((32,), -1),
        queue_ptr=torch.zeros(1, dtype=torch.long),
    )
    content = {"opt": namespace(momentum=0.99), container: state(model), "epoch": 200}
    return Written(content | {"optimizer": optimizer()}, both(arch), facts={"epoch": 200})


def bolts(arch: str, *, newer: bool) -> Written:
    encoders = {"encoder_q": network(arch, "query", nn.Linear(width(arch), 8))}
    encoders["encoder_k"] = network(arch, "key", nn.Linear(width(arch), 8))
    if newer:
        pointer = torch.tensor(0)
        places = ("queue", "val_queue")
        queues = {k: tree(representations=queue()["queue"], pointer=pointer) for k in places}
        heads = {k: mlp(8, 8, 8) for k in ("head_q", "head_k")}
        model = tree(**encoders, **heads, **queues)
    else:
        checks = {f"val_{k}": v for k, v in queue().items()}
        model = tree(**encoders, **queue(), **checks)
    hyper = {"base_encoder": arch, "emb_dim": 8, "data_dir": "./", "use_mlp": False}
    return Written(lightning(model, hyper), both(arch))


def lightning(model: nn.Module, hyper: Any) -> dict[str, Any]:
    """Nest a model as Lightning's `Trainer.save_checkpoint` does."""
    best = {
        "monitor": "train_loss",
        "best_model_score": torch.tensor(0.5),
        "best_model_path": "logs/version_0/checkpoints/epoch=99-step=100.ckpt",
        "kth_best_model_path": "",
        "last_model_path": "",
    }
    return {
        "epoch": 99,
        "global_step": 1000,
        "pytorch-lightning_version": "1.9.5",
        "state_dict": state(model),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 100}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'train_loss'}": best},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [{"base_lrs": [0.3], "last_epoch": 100, "_last_lr": [0.1]}],
        **({} if hyper is None else {"hparams_name": "kwargs", "hyper_parameters": hyper}),
    }


def resim(arch: str, *, norm: bool) -> Written:
    def encoder(branch: str) -> nn.Module:
        net = network(arch, branch, mlp(width(arch), 16, 8))
        for level in (5, 4, 3):
            net.add_module(f"fpn_lateral{level}", conv(width(arch) >> (5 - level), 8, 1))
            if level < 5:
                net.add_module(f"fpn_output{level}", conv(8, 8, 3))
        return net

    def conv(wide: int, narrow: int, size: int) -> nn.Module:
        made = nn.Conv2d(wide, narrow, size, padding=size // 2, bias=not norm)
        return nn.Sequential(made, nn.BatchNorm2d(narrow)) if norm else made

    model = tree(encoder_q=encoder("query"), encoder_k=encoder("key"), **queue())
    content = {"epoch": 200, "arch": arch, "state_dict": state(parallel(model))}
    return Written(content | {"optimizer": optimizer()}, both(arch), facts={"epoch": 200})


def moco_v3(arch: str) -> Written:
    def head() -> nn.Module:
        return mlp(width(arch), 16, 8, norm=True, last_norm=True, bias=False)

    model = tree(
        base_encoder=network(arch, "query", head()),
        momentum_encoder=network(arch, "key", head()),
        predictor=mlp(8, 16, 8, norm=True, last_norm=True, bias=False),
    )
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 12}
    content = {"epoch": 300, "arch": arch, "state_dict": state(parallel(model))}
    content |= {"optimizer": optimizer(), "scaler": scaler}
    return Written(content, both(arch), facts={"epoch": 300, "method": "MoCo v3"})


def simsiam(arch: str) -> Written:
    dim = width(arch)
    fc = nn.Sequential(
        *mlp(dim, 16, 16, norm=True, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16, affine=False),
    )
    model = tree(encoder=network(arch, "query", fc), predictor=mlp(16, 8, 16, norm=True))
    content = {"epoch": 100, "arch": arch, "state_dict": state(parallel(model))}
    return Written(content | {"optimizer": optimizer()}, one(arch), facts={"epoch": 100})


# ---- PyContrast, SupCon, PixPro, SoCo ----------------------------------------------------------


def pycontrast(arch: str, *, ema: bool = False, jigsaw: bool = False) -> Written:
    def model(branch: str) -> nn.Module:
        heads = {"head": mlp(width(arch), 16, 8)}
        if jigsaw:
            heads["head_jig"] = tree(fc1=nn.Linear(width(arch), 8), fc2=nn.Linear(72, 8))
        return tree(encoder=network(arch, branch), **heads)

    content: dict[str, Any] = {"opt": namespace(mem="moco" if ema else "bank")}
    content["model"] = state(parallel(model("query")))
    content["contrast"] = OrderedDict(memory=torch.randn(32, 8))
    content |= {"optimizer": optimizer(), "epoch": 200}
    if not ema:
        return Written(content, one(arch), "torch-legacy", {"epoch": 200})
    content["model_ema"] = state(model("key"))  # it alone is not DistributedDataParallel's
    content["amp"] = {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 3}}
    return Written(content, both(arch, "query", "ema"), facts={"epoch": 200})


def supcon(arch: str) -> Written:
    model = tree(encoder=parallel(network(arch)), head=mlp(width(arch), 16, 8))
    opt = namespace(method="SupCon", save_folder="./save/SupCon/path_models", cosine=True)
    content = {"opt": opt, "model": state(model), "optimizer": optimizer(), "epoch": 350}
    return Written(content, one(arch), facts={"epoch": 350})


class PixProHead(nn.Module):
    """Of 1x1 convolutions in PixPro, of linear layers in SoCo; its bn1 is no backbone's."""

    def __init__(self, wide: int, inner: int, narrow: int, *, flat: bool = False) -> None:
        super().__init__()
        layer = nn.Linear if flat else partial(nn.Conv2d, kernel_size=1)
        self.linear1 = layer(wide, inner)
        self.bn1 = nn.BatchNorm1d(inner) if flat else nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU(inplace=True)
        self.linear2 = layer(inner, narrow)


def pixpro(arch: str, *, published: bool = False, instance: bool = False) -> Written:
    dim = width(arch)
    model = tree(
        encoder=network(arch, "query"),
        projector=PixProHead(dim, 16, 8),
        encoder_k=network(arch, "key"),
        projector_k=PixProHead(dim, 16, 8),
        value_transform=nn.Conv2d(8, 8, 1),
    )
    if instance:
        model.projector_instance = PixProHead(dim, 16, 8)
        model.projector_instance_k = PixProHead(dim, 16, 8)
        model.predictor = PixProHead(8, 16, 8)
    content: dict[str, Any] = {"model": state(parallel(model))}
    if published:
        return Written(content, both(arch))
    scheduler = {"last_epoch": 100, "multiplier": 100.0}
    opt = namespace(pixpro_p=2.0, output_dir="./output/pixpro_base_r50_100ep", model="PixPro")
    content = {"opt": opt, **content, "optimizer": optimizer(), "scheduler": scheduler}
    return Written(content | {"epoch": 100}, both(arch), facts={"epoch": 100})


def soco(arch: str, *, fpn: bool) -> Written:
    def parts(end: str) -> dict[str, nn.Module]:
        made: dict[str, nn.Module] = {f"encoder{end}": network(arch, "key" if end else "query")}
        if fpn:
            made |= {f"neck{end}": _mm_fpn(width(arch), norm=True), f"head{end}": _soco_head()}
        return made | {f"projector{end}": PixProHead(8, 16, 8, flat=True)}

    model = tree(**parts(""), predictor=PixProHead(8, 16, 8, flat=True), **parts("_k"))
    for name, buffer in ({} if fpn else queue()).items():
        model.register_buffer(name, buffer)
    opt = namespace(output_dir="./output/SoCo", contrast_momentum=0.99, cutout_prob=0.5)
    content = {"opt": opt, "model": state(parallel(model)), "optimizer": optimizer()}
    content |= {"scheduler": {"last_epoch": 400}, "epoch": 400}
    return Written(content, both(arch), facts={"epoch": 400})


def _soco_head() -> nn.Module:
    """A box head whose names, conv1 and bn1 among them, look like a backbone's."""
    head = nn.Module()
    for index in (1, 2, 3, 4):
        head.add_module(f"conv{index}", nn.Conv2d(8, 8, 3, padding=1, bias=False))
        head.add_module(f"bn{index}", nn.BatchNorm2d(8))
    head.fc1 = nn.Linear(8, 8)
    return head


def _mm_fpn(dim: int, *, norm: bool) -> nn.Module:
    def conv(wide: int, size: int) -> nn.Module:
        made = {"conv": nn.Conv2d(wide, 8, size, padding=size // 2, bias=not norm)}
        return tree(**made, bn=nn.BatchNorm2d(8)) if norm else tree(**made)

    return tree(
        lateral_convs=nn.ModuleList(conv(dim >> (3 - level), 1) for level in range(4)),
        fpn_convs=nn.ModuleList(conv(8, 3) for _ in range(4)),
    )


# ---- SwAV, flat files, Barlow Twins, VICReg, DINO ----------------------------------------------


def swav(arch: str, *, training: bool = False, clusters: bool = False) -> Written:
    net = network(arch)
    del net.fc
    net.projection_head = mlp(width(arch), 16, 8, norm=True)
    if clusters:
        heads = {f"prototypes{i}": nn.Linear(8, 12, bias=False) for i in range(3)}
        net.prototypes = tree(**heads)
    else:
        net.prototypes = nn.Linear(8, 12, bias=False)
    flat = state(parallel(net))
    if not training:
        return Written(flat, one(arch), "torch-legacy")
    amp = {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 1}}
    content = {"epoch": 400, "state_dict": flat, "optimizer": optimizer(), "amp": amp}
    return Written(content, one(arch), facts={"epoch": 400})


def flat(arch: str, *, classes: int = 0, container: str = "", format: str = "torch") -> Written:
    net = network(arch, fc=nn.Linear(width(arch), classes) if classes else None)
    content: Any = state(net)
    return Written({container: content} if container else content, one(arch), format)


def timm_training(arch: str) -> Written:
    def head() -> nn.Module:
        return nn.Linear(width(arch), 10)

    content = {
        "epoch": 90,
        "arch": arch,
        "optimizer": optimizer(),
        "version": 2,
        "args": namespace(model=arch, data_dir="imagenet", crop_pct=None, mean=None, std=None),
        "amp_scaler": {"scale": 65536.0},
        "state_dict": state(network(arch, "query", head())),
        "state_dict_ema": state(network(arch, "key", head())),
        "metric": 76.5,
        "saver": {"checkpoint_files": [("checkpoint-90.pth.tar", 76.5)], "pending": (90, 76.5)},
    }
    return Written(content, both(arch, "query", "ema"), facts={"epoch": 90})


def odd_objects() -> dict[str, Any]:
    """What people's own training scripts put beside weights."""
    return {
        "args": namespace(output=pathlib.PurePosixPath("runs/1"), device=torch.device("cpu")),
        "started": datetime.datetime(2023, 1, 1, 12),
        "config": foreign("omegaconf.dictconfig.DictConfig", _content={"lr": 0.3}, _metadata=None),
        "meters": defaultdict(list, loss=[np.float32(7.0)]),
        "best": np.float64(61.5),
        "seen": {1, 2},
        "filter": foreign_function("exclude_bias_and_norm"),
        "history": foreign("training.history.History", base=list),
        "random": np.random.get_state(),
    }


def openmmlab_extracted(arch: str) -> Written:
    return Written({"state_dict": dict(weights(arch)), "author": "MMSelfSup"}, one(arch))


def lars() -> dict[str, Any]:
    """The state of an optimiser whose groups hold functions of the training script."""
    held = optimizer()
    for name in ("weight_decay_filter", "lars_adaptation_filter"):
        held["param_groups"][0][name] = foreign_function("exclude_bias_and_norm")
    return held


def barlow_twins(arch: str) -> Written:
    projector = mlp(width(arch), 16, 16, 8, norm=True, bias=False)
    bn = nn.BatchNorm1d(8, affine=False)
    model = tree(backbone=network(arch), projector=projector, bn=bn)
    content = {"epoch": 1000, "model": state(parallel(model)), "optimizer": lars()}
    return Written(content, one(arch), facts={"epoch": 1000})


def vicreg(arch: str, *, local: bool) -> Written:
    net = network(arch)
    del net.fc  # its own ResNet has none, and pads by a layer in front, which has no tensors
    heads: dict[str, nn.Module] = {"projector": mlp(width(arch), 16, 16, 8, norm=True)}
    if local:
        heads = {"maps_projector": mlp(width(arch), 8, 8, 8, norm=True), **heads}
        heads["classifier"] = nn.Linear(width(arch), 10)
    content = {"epoch": 300, "model": state(parallel(tree(backbone=net, **heads)))}
    return Written(content | {"optimizer": lars()}, one(arch), facts={"epoch": 300})


def dino(arch: str) -> Written:
    def model(branch: str) -> nn.Module:
        last = nn.Module()  # weight norm splits the last layer's weight into length and direction
        last.weight_g = nn.Parameter(torch.ones(12, 1))
        last.weight_v = nn.Parameter(torch.randn(12, 8))
        gelu = nn.Sequential(nn.Linear(width(arch), 16), nn.GELU(), nn.Linear(16, 8))
        return parallel(tree(backbone=network(arch, branch), head=tree(mlp=gelu, last_layer=last)))

    content = {
        "student": state(model("key")),
        "teacher": state(model("query")),
        "optimizer": optimizer(),
        "epoch": 800,
        "args": namespace(
            out_dim=60000, output_dir="/checkpoint/dino", global_crops_scale=(0.1, 1)
        ),
        "dino_loss": OrderedDict(center=torch.zeros(1, 12)),
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 7},
    }
    return Written(content, both(arch, "teacher", "student"), facts={"epoch": 800})


# ---- OpenMMLab ---------------------------------------------------------------------------------


_MM_CONFIG = """model = dict(
    type='{type}',
    backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN'), style='{style}'))
img_norm_cfg = dict(
    mean={mean}, std={std}, to_rgb={to_rgb})
"""


def mm_config(type_: str, *, caffe: bool = False) -> str:
    """Write the part of a config's text that tells what images and which network it means."""
    if caffe:
        mean, std, style = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], "caffe"
    else:
        mean, std, style = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "pytorch"
    return _MM_CONFIG.format(type=type_, style=style, mean=mean, std=std, to_rgb=not caffe)


def mmcv(model: nn.Module, epoch: int = 200, config: str | None = None) -> dict[str, Any]:
    """Nest a model as mmcv 1.x's `save_checkpoint` does."""
    meta = {
        "epoch": epoch,
        "iter": 1000 * epoch,
        "mmcv_version": "1.0.3",
        "time": "Wed Aug 12 10:00:00 2020",
        "config": config or mm_config("MOCO"),
        "hook_msgs": {},
    }
    return {"meta": meta, "state_dict": state(model), "optimizer": optimizer()}


def mmengine(model: nn.Module, epoch: int = 200, config: str | None = None) -> dict[str, Any]:
    """Nest a model as mmengine's `Runner.save_checkpoint` does."""
    history = foreign(
        "mmengine.logging.history_buffer.HistoryBuffer",
        max_length=1000000,
        _log_history=np.array([7.0, 6.5]),
        _count_history=np.array([1, 1]),
    )
    hub = {
        "log_scalars": OrderedDict({"train/loss": history}),
        "runtime_info": OrderedDict(epoch=epoch, cfg="model = dict(type='MoCo')\n"),
        "resumed_keys": OrderedDict({"train/loss": True}),
    }
    meta = {
        "epoch": epoch,
        "iter": 1000 * epoch,
        "cfg": config or mm_config("MoCo"),
        "seed": 0,
        "experiment_name": "mocov2_resnet50_8xb32-coslr-200e_in1k_20230101_000000",
        "time": datetime.datetime(2023, 1, 1).strftime("%Y%m%d_%H%M%S"),
        "mmengine_version": "0.7.0",
    }
    content = {"meta": meta, "state_dict": state(model), "message_hub": hub}
    return content | {"optimizer": optimizer(), "param_schedulers": [{"last_step": epoch}]}


def _mm_neck(arch: str) -> nn.Module:
    return tree(mlp=mlp(width(arch), 16, 8))


def openselfsup_moco(arch: str, *, dense: bool = False, neck: bool = False) -> Written:
    """The backbone stands in it twice, as itself and as the encoder's first part."""
    model = tree(
        encoder_q=nn.Sequential(_no_fc(arch, "query"), _mm_neck(arch)),
        encoder_k=nn.Sequential(_no_fc(arch, "key"), _mm_neck(arch)),
    )
    model.backbone = model.encoder_q[0]
    if neck:
        model.neck = model.encoder_q[1]
    for name, value in queue().items():
        model.register_buffer(name, value)
        if dense:
            model.register_buffer(name.replace("queue", "queue2"), value.clone())
    return Written(mmcv(model), both(arch), facts={"epoch": 200})


def openselfsup_byol(arch: str) -> Written:
    model = tree(
        online_net=nn.Sequential(_no_fc(arch, "query"), _mm_neck(arch)),
        target_net=nn.Sequential(_no_fc(arch, "key"), _mm_neck(arch)),
    )
    model.backbone = model.online_net[0]
    model.head = tree(predictor=tree(mlp=mlp(8, 16, 8, norm=True)))
    return Written(mmcv(model), both(arch), facts={"epoch": 200})


def openselfsup_plain(arch: str) -> Written:
    model = tree(backbone=_no_fc(arch), neck=_mm_neck(arch), head=tree(fc=nn.Linear(8, 4)))
    return Written(mmcv(model), one(arch), facts={"epoch": 200})


def mmselfsup(arch: str, *, momentum: str, whole: bool = True, queued: bool = False) -> Written:
    backbone, neck = _no_fc(arch, "key"), _mm_neck(arch)
    averaged = nn.Sequential(backbone, neck) if whole else backbone
    average = tree(module=averaged, steps=torch.tensor(1000))
    head = tree(predictor=tree(fc0=nn.Linear(8, 8), bn0=nn.BatchNorm1d(8)))
    parts = {"backbone": _no_fc(arch, "query"), "neck": _mm_neck(arch), "head": head}
    model = tree(**parts, **{momentum: average}, **(queue() if queued else {}))
    return Written(mmengine(model), both(arch), facts={"epoch": 200})


def _no_fc(arch: str, branch: str = "query") -> Any:
    net = network(arch, branch)
    del net.fc
    return net


def mmdet(arch: str, *, c4: bool, engine: bool = False) -> Written:
    backbone = _no_fc(arch)
    rpn = tree(rpn_conv=nn.Conv2d(8, 8, 3), rpn_cls=nn.Conv2d(8, 3, 1), rpn_reg=nn.Conv2d(8, 12, 1))
    bbox: dict[str, nn.Module] = {"fc_cls": nn.Linear(8, 81), "fc_reg": nn.Linear(8, 320)}
    if c4:
        roi = tree(shared_head=tree(layer4=backbone.layer4), bbox_head=tree(**bbox))
        del backbone.layer4
        model = tree(backbone=backbone, rpn_head=rpn, roi_head=roi)
    else:
        bbox["shared_fcs"] = nn.ModuleList([nn.Linear(392, 8), nn.Linear(8, 8)])
        roi = tree(bbox_head=tree(**bbox))
        neck = _mm_fpn(width(arch), norm=False)
        model = tree(backbone=backbone, neck=neck, rpn_head=rpn, roi_head=roi)
    nest = mmengine if engine else mmcv
    content = nest(model, 12, mm_config("FasterRCNN", caffe=c4))
    return Written(content, one(arch), facts={"epoch": 12} | (CAFFE if c4 else {}))


# ---- solo-learn, lightly, VISSL ----------------------------------------------------------------


def solo_learn(arch: str, *, old: bool, stem: str = "imagenet") -> Written:
    net = "encoder" if old else "backbone"
    dim = width(arch)
    model = tree(
        **{net: network(arch, "query", stem=stem)},
        classifier=nn.Linear(dim, 10),
        **{f"momentum_{net}": network(arch, "key", stem=stem)},
        projector=mlp(dim, 16, 8),
        momentum_projector=mlp(dim, 16, 8),
        queue=torch.randn(2, 8, 32),
        queue_ptr=torch.zeros(1, dtype=torch.long),
    )
    return Written(lightning(model, None), both(arch, stem=stem), facts={"stem": stem})


def solo_learn_plain(arch: str) -> Written:
    model = tree(
        backbone=network(arch), classifier=nn.Linear(width(arch), 10), projector=mlp(8, 8, 8)
    )
    return Written(lightning(model, None), one(arch))


def _lightly_head(arch: str) -> nn.Module:
    return tree(layers=mlp(width(arch), 16, 8))


def _lightly_bank() -> nn.Module:
    bank = {"bank": torch.randn(32, 8), "bank_ptr": torch.zeros(1, dtype=torch.long)}
    return tree(memory_bank=tree(**bank), cross_entropy=nn.CrossEntropyLoss())


def lightly_benchmark(arch: str, first: str, second: str, names: tuple[str, str]) -> Written:
    """`first` is the module that holds the default branch, `second` the other one."""
    nets = {first: network(arch, "query"), second: network(arch, "key")}
    ordered = {name: nets[name] for name in sorted(nets, key=len)}  # `backbone` was made first
    heads = {k.replace("backbone", "projection_head"): _lightly_head(arch) for k in ordered}
    classifier = tree(classification_head=nn.Linear(width(arch), 10))
    criterion = tree(center=torch.zeros(1, 1, 8)) if "student" in names else _lightly_bank()
    model = tree(**ordered, **heads, criterion=criterion, online_classifier=classifier)
    hyper = {"batch_size_per_device": 64, "num_classes": 1000}
    return Written(lightning(model, hyper), both(arch, *names))


def lightly_example(arch: str, first: str, second: str, names: tuple[str, str]) -> Written:
    """Parts of a `nn.Sequential` of the network's children are called by their place in it."""

    def listed(branch: str) -> nn.Module:
        return nn.Sequential(*list(network(arch, branch).children())[:-1])

    heads = {
        "projection_head": _lightly_head(arch),
        "projection_head_momentum": _lightly_head(arch),
    }
    nets = {first: listed("query"), second: listed("key")}
    model = tree(**nets, **heads, criterion=_lightly_bank())
    return Written(lightning(model, None), both(arch, *names))


class SplitBatchNorm(nn.BatchNorm2d):
    """Statistics of each of `num_splits` parts of a batch, one after another in one buffer."""

    def __init__(self, num_features: int, num_splits: int = 4) -> None:
        super().__init__(num_features)
        self.register_buffer("running_mean", torch.zeros(num_features * num_splits))
        self.register_buffer("running_var", torch.ones(num_features * num_splits))


def _split(values: State, splits: int = 4) -> State:
    def spread(tensor: Tensor) -> Tensor:
        parts = [tensor * (1 + 0.1 * index) for index in range(splits)]
        return torch.cat(parts)

    return {k: spread(v) if "running" in k else v for k, v in values.items()}


def _folded(values: State, splits: int = 4) -> State:
    """Take the mean over the splits, as lightly's own `train(False)` does."""
    return {
        k: v.view(splits, -1).mean(dim=0) if "running" in k else v
        for k, v in _split(values, splits).items()
    }


def lightly_splits(arch: str, *, cifar: bool) -> Written:
    """Networks with split norms: torchvision's, or lightly's own small ones (names differ)."""
    stem = "cifar" if cifar else "imagenet"

    def listed(branch: str) -> nn.Module:
        with torch.device("meta"):
            net: Any = getattr(torchvision.models, arch)(norm_layer=SplitBatchNorm)
            if cifar:
                net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        values = _split(weights(arch, branch, stem))
        net.load_state_dict(values, strict=False, assign=True)
        if not cifar:
            return nn.Sequential(*list(net.children())[:-1])
        for block in net.modules():
            if hasattr(block, "downsample"):
                block.shortcut = block.downsample or nn.Sequential()
                del block.downsample
        kept = (net.conv1, net.bn1, net.layer1, net.layer2, net.layer3, net.layer4)
        return nn.Sequential(*kept, nn.AdaptiveAvgPool2d(1))

    model = tree(
        backbone=listed("query"),
        projection_head=_lightly_head(arch),
        backbone_momentum=listed("key"),
        projection_head_momentum=_lightly_head(arch),
        criterion=_lightly_bank(),
    )
    wanted = {k: _folded(v) for k, v in both(arch, stem=stem).items()}
    return Written(lightning(model, None), wanted, facts={"stem": stem})


def vissl_training(arch: str, *, moco: bool = False) -> Written:
    def trunk(branch: str) -> nn.Module:
        net = _no_fc(arch, branch)
        return tree(_feature_blocks=nn.ModuleDict(dict(net.named_children())))

    heads = nn.ModuleList([tree(clf=mlp(width(arch), 16, 8))])
    loss: dict[str, Tensor] = OrderedDict()
    if moco:  # the loss holds the momentum encoder
        loss = state(tree(**queue(), moco_encoder=tree(trunk=trunk("key"), heads=heads)))
    classy = {
        "train": True,
        "base_model": {"model": {"trunk": state(trunk("query")), "heads": state(heads)}},
        "meters": [{"name": "accuracy_list_meter"}],
        "optimizer": {"optim": optimizer(), "grad_clipping": None},
        "phase_idx": 199,
        "train_phase_idx": 199,
        "num_updates": 1000,
        "losses": [6.5],
        "hooks": {},
        "train_dataset_iterator": None,
    }
    content = {"phase_idx": 199, "iteration": 1000, "loss": loss, "iteration_num": 4}
    content |= {"train_phase_idx": 199, "classy_state_dict": classy, "type": "consolidated"}
    return Written(content, both(arch) if moco else one(arch))


def vissl_converted(arch: str, *, container: str = "", prefix: str = "_feature_blocks.") -> Written:
    content: Any = OrderedDict((prefix + k, v) for k, v in weights(arch).items())
    return Written({container: content} if container else content, one(arch))


# ---- Hugging Face, SimCLR v2 -------------------------------------------------------------------


def huggingface(arch: str, *, classifier: bool, format: str = "safetensors") -> Written:
    net = _no_fc(arch)

    def layer(convolution: nn.Module, normalization: nn.Module) -> nn.Module:
        return tree(convolution=convolution, normalization=normalization, activation=nn.ReLU())

    def block(source: Any) -> nn.Module:
        count = 3 if hasattr(source, "conv3") else 2
        pairs = [
            (getattr(source, f"conv{i + 1}"), getattr(source, f"bn{i + 1}")) for i in range(count)
        ]
        shortcut: nn.Module = nn.Identity()
        if source.downsample is not None:
            shortcut = tree(convolution=source.downsample[0], normalization=source.downsample[1])
        return tree(shortcut=shortcut, layer=nn.Sequential(*(layer(*pair) for pair in pairs)))

    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    layers = (tree(layers=nn.Sequential(*map(block, stage))) for stage in stages)
    model = tree(
        embedder=tree(embedder=layer(net.conv1, net.bn1)),
        encoder=tree(stages=nn.ModuleList(layers)),
    )
    if classifier:
        head = nn.Sequential(nn.Flatten(), nn.Linear(width(arch), 10))
        model = tree(resnet=model, classifier=head)
    return Written(state(model), one(arch), format)


def _relu_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU())


def simclr_v2(arch: str) -> Written:
    net = _no_fc(arch)

    def block(source: Any) -> nn.Module:
        projection: nn.Module = nn.Identity()
        if source.downsample is not None:
            shortcut, norm = source.downsample
            projection = tree(shortcut=shortcut, bn=_relu_norm(norm))
        parts = [source.conv1, _relu_norm(source.bn1), source.conv2, _relu_norm(source.bn2)]
        parts += [source.conv3, _relu_norm(source.bn3)]
        return tree(projection=projection, net=nn.Sequential(*parts))

    stem = nn.Sequential(net.conv1, _relu_norm(net.bn1), nn.MaxPool2d(3, 2, 1))
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    blocks = [tree(blocks=nn.ModuleList(map(block, stage))) for stage in stages]
    model = tree(net=nn.Sequential(stem, *blocks), fc=nn.Linear(width(arch), 10))
    head = tree(layers=mlp(width(arch), 16, 8, norm=True, bias=False))
    pixels = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return Written({"resnet": state(model), "head": state(head)}, one(arch), facts=pixels)


# ---- Detectron2 and Caffe2 ---------------------------------------------------------------------

_LEAVES = {"weight": "s", "bias": "b"}


def _place(name: str) -> tuple[str, int, str, str]:
    """Split a torchvision name: stage, block, which convolution (or its norm), leaf."""
    *path, leaf = name.split(".")
    if len(path) == 1:
        return "conv1", 0, path[0], leaf
    part = "shortcut" if path[2] == "downsample" else f"conv{path[2][-1]}"
    norm = path[2].startswith("bn") or path[2:] == ["downsample", "1"]
    return f"res{int(path[0][-1]) + 1}", int(path[1]), part + (".norm" if norm else ""), leaf


def detectron2_name(name: str) -> str:
    stage, block, part, leaf = _place(name)
    if stage == "conv1":
        return f"stem.conv1{'.norm' if part == 'bn1' else ''}.{leaf}"
    return f"{stage}.{block}.{part}.{leaf}"


def detectron2_backbone(arch: str, format: str) -> Written:
    named = {detectron2_name(k): v.numpy() for k, v in weights(arch).items()}
    content = {"model": named, "__author__": "MOCO", "matching_heuristics": True}
    return Written(content, one(arch), format)


def detectron2_model(arch: str, *, target: str, norm: str = "BN", extra: bool = False) -> Written:
    from detectron2.modeling import build_model

    model = build_model(_detectron2_config(target, norm))
    if extra:
        model.roi_heads.res5.add_module("norm", nn.BatchNorm2d(2048))
    values = weights(arch)
    if norm == "FrozenBN":
        values = {k: v for k, v in values.items() if not k.endswith("num_batches_tracked")}
    named = {detectron2_name(k): v for k, v in values.items()}
    homes = {k: _detectron2_home(k, target) + k for k in named}
    model.load_state_dict({homes[k]: v for k, v in named.items()}, strict=False, assign=True)
    assert set(homes.values()) <= set(model.state_dict())
    content = {"model": state(model), "optimizer": optimizer(), "iteration": 23999}
    content["scheduler"] = {"last_epoch": 24000, "_last_lr": [2e-4]}
    expected = one(arch) if norm == "BN" else {"query": without_counters(weights(arch))}
    return Written(content, expected)


def _detectron2_home(name: str, target: str) -> str:
    if target == "c4" and name.startswith("res5"):
        return "roi_heads."
    return "backbone.bottom_up." if target == "fpn" else "backbone."


def _detectron2_config(target: str, norm: str) -> Any:
    from detectron2.config import get_cfg

    config = get_cfg()
    model = config.MODEL
    model.DEVICE, model.RESNETS.NORM, model.RESNETS.STRIDE_IN_1X1 = "cpu", norm, False
    model.ROI_HEADS.NUM_CLASSES = 2
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    model.ROI_BOX_HEAD.FC_DIM = 8
    if target == "fpn":
        levels = ["res2", "res3", "res4", "res5"]
        model.BACKBONE.NAME = "build_resnet_fpn_backbone"
        model.RESNETS.OUT_FEATURES, model.FPN.IN_FEATURES, model.FPN.OUT_CHANNELS = (
            levels,
            levels,
            8,
        )
        model.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        model.ROI_HEADS.NAME = "StandardROIHeads"
        model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    elif target == "dc5":
        model.RESNETS.OUT_FEATURES, model.RESNETS.RES5_DILATION = ["res5"], 2
        model.RPN.IN_FEATURES, model.ROI_HEADS.IN_FEATURES = ["res5"], ["res5"]
        model.RPN.CONV_DIMS = [8]
        model.ROI_HEADS.NAME = "StandardROIHeads"
    return config


def caffe2_name(name: str, leaves: Mapping[str, str]) -> str:
    stage, block, part, leaf = _place(name)
    if stage == "conv1":
        return f"res_conv1_bn_{leaves[leaf]}" if part == "bn1" else "conv1_w"
    branches = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}
    base, _, norm = part.partition(".")
    return f"{stage}_{block}_branch{branches[base]}_" + (f"bn_{leaves[leaf]}" if norm else "w")


def caffe2(arch: str, *, affine: bool, blobs: bool = False) -> Written:
    statistics = {"weight": "gamma", "bias": "beta"}
    statistics |= {"running_mean": "running_mean", "running_var": "running_var"}
    leaves = _LEAVES if affine else statistics
    named = {
        caffe2_name(k, leaves): v.numpy() for k, v in weights(arch).items() if _in_caffe2(k, leaves)
    }
    named["conv1_b"] = np.zeros(64, np.float32)  # the stem's norm follows, so it is never used
    named["fc1000_w"] = np.zeros((10, width(arch)), np.float32)
    named["fc1000_b"] = np.zeros(10, np.float32)
    content: Any = named
    if blobs:
        momenta = {f"{k}_momentum": np.zeros_like(v) for k, v in list(named.items())[:2]}
        content = {"blobs": named | momenta, "cfg": "MODEL:\n  TYPE: generalized_rcnn\n"}
    expected = without_counters(weights(arch))
    if affine:
        # An affine map is the norm of mean 0 whose variance and epsilon add up to 1.
        expected = {k: _affine(k, v) for k, v in expected.items()}
    return Written(content, {"query": expected}, "pickle", CAFFE)


def _in_caffe2(name: str, leaves: Mapping[str, str]) -> bool:
    _, _, part, leaf = _place(name)
    return leaf in leaves or (leaf == "weight" and "norm" not in part)


def _affine(name: str, value: Tensor) -> Tensor:
    if name.endswith("running_mean"):
        return torch.zeros_like(value)
    return torch.ones_like(value) - 1e-5 if name.endswith("running_var") else value


# ---- what must be refused ----------------------------------------------------------------------


def cmc() -> Written:
    """Two networks of half the width, one for lightness and one for colour."""

    def half(channels: int) -> nn.Module:
        with torch.device("meta"):
            net: Any = torchvision.models.resnet50(width_per_group=32)
        net = net.to_empty(device="cpu")
        net.conv1 = nn.Conv2d(channels, 32, 7, 2, 3, bias=False)
        net.fc = nn.Identity()
        return net

    model = tree(encoder1=half(1), encoder2=half(2), head1=mlp(8, 8), head2=mlp(8, 8))
    zeroed = {k: torch.zeros_like(v) for k, v in state(parallel(model)).items()}
    return Written({"opt": namespace(), "model": zeroed, "epoch": 240}, {})


def deep_stem(*, mmcls: bool) -> Written:
    """ResNet-50-D: three convolutions in the stem; timm and OpenMMLab call them differently."""
    values = dict(weights("resnet50"))
    convs = [torch.zeros(32, 3, 3, 3), torch.zeros(32, 32, 3, 3), torch.zeros(64, 32, 3, 3)]
    norms = {k: v for k, v in values.items() if k.startswith("bn1.")}
    del values["conv1.weight"]
    for index, conv in enumerate(convs):
        values[f"stem.{3 * index}.weight" if mmcls else f"conv1.{3 * index}.weight"] = conv
    for name, value in norms.items():
        leaf = name.split(".")[1]
        short = value[:32] if value.ndim else value
        for index in (1, 4):
            values[f"stem.{index}.{leaf}" if mmcls else f"conv1.{index}.{leaf}"] = short
        if mmcls:
            values[f"stem.7.{leaf}"] = values.pop(name)
    renamed = {k.replace("downsample.1", "downsample.2"): v for k, v in values.items()}
    renamed = {k.replace("downsample.0", "downsample.1"): v for k, v in renamed.items()}
    if not mmcls:
        return Written(renamed, {})
    prefixed = {f"backbone.{k}": v for k, v in renamed.items()}
    return Written({"meta": {"epoch": 100}, "state_dict": prefixed}, {})


def selective_kernels() -> Written:
    written = simclr_v2("resnet50")
    resnet = dict(written.content["resnet"])
    del resnet["net.0.0.weight"]
    resnet |= {
        "net.0.0.weight": torch.zeros(32, 3, 3, 3),
        "net.0.2.weight": torch.zeros(32, 32, 3, 3),
    }
    resnet["net.0.4.weight"] = torch.zeros(64, 32, 3, 3)
    for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(count):
            start = f"net.{stage}.blocks.{block}.net."
            for name in [k for k in resnet if k.startswith((f"{start}4.", f"{start}5."))]:
                resnet.pop(name)
            resnet[f"{start}2.main_conv.0.weight"] = torch.zeros(8, 8, 3, 3)
            resnet[f"{start}2.mixing_conv.0.weight"] = torch.zeros(8, 8, 1, 1)
            resnet.pop(f"{start}2.weight")
    return Written({"resnet": resnet, "head": written.content["head"]}, {})


def transformer() -> "OrderedDict[str, Tensor]":
    block = {
        "norm1": nn.LayerNorm(8),
        "attn": tree(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8)),
        "norm2": nn.LayerNorm(8),
        "mlp": tree(fc1=nn.Linear(8, 32), fc2=nn.Linear(32, 8)),
    }
    model = tree(
        cls_token=torch.zeros(1, 1, 8),
        pos_embed=torch.zeros(1, 197, 8),
        patch_embed=tree(proj=nn.Conv2d(3, 8, 16, 16)),
        blocks=nn.ModuleList([tree(**block)]),
        norm=nn.LayerNorm(8),
    )
    return state(model)


def vit(origin: str) -> Written:
    plain = transformer()
    if origin == "timm":
        return Written(plain, {})
    if origin == "moco-v3":
        pair = {"base_encoder": plain, "momentum_encoder": plain}
        named = {f"module.{n}.{k}": v for n, values in pair.items() for k, v in values.items()}
        return Written({"epoch": 300, "arch": "vit_small", "state_dict": named}, {})
    student = {f"module.backbone.{k}": v for k, v in plain.items()}
    teacher = {f"backbone.{k}": v for k, v in plain.items()}
    content = {"student": student, "teacher": teacher, "args": namespace(), "epoch": 800}
    return Written(content, {})


def headless() -> Written:
    """A checkpoint of heads, whose names look a little like a backbone's."""
    model = tree(projector=PixProHead(8, 8, 8), head=_soco_head(), classifier=nn.Linear(8, 4))
    return Written({"epoch": 3, "state_dict": state(parallel(model))}, {})


def two_networks() -> Written:
    pair = tree(net_a=network("resnet18"), net_b=network("resnet18", "key"))
    return Written({"state_dict": state(pair)}, {})


# ---- the lists ---------------------------------------------------------------------------------

_D2 = ("detectron2",)
ORIGINS = (
    Origin(
        "moco v1",
        "moco",
        "facebookresearch/moco moco/builder.py, main_moco.py",
        partial(moco, v2=False, format="torch-legacy", facts={"method": "MoCo v1"}),
    ),
    Origin(
        "moco v2",
        "moco",
        "facebookresearch/moco moco/builder.py, main_moco.py",
        partial(moco, v2=True, facts={"method": "MoCo v2"}),
    ),
    Origin(
        "moco v2, query alone",
        "moco",
        "facebookresearch/moco issue 27, main_lincls.py",
        moco_cleaned,
    ),
    Origin(
        "pcl v2",
        "moco",
        "salesforce/PCL pcl/builder.py, main_pcl.py",
        partial(moco, v2=True, format="torch-legacy"),
    ),
    Origin("clsa", "moco", "maple-research-lab/CLSA model/CLSA.py", partial(moco, v2=True)),
    Origin("msf", "msf", "UMBCvision/MSF train_msf.py", msf),
    Origin("msf, model", "msf", "UMBCvision/MSF eval_knn.py", partial(msf, container="model")),
    Origin(
        "bolts moco",
        "bolts-moco",
        "Lightning-Universe/lightning-bolts pl_bolts/models/self_supervised/moco/moco_module.py",
        partial(bolts, newer=False),
    ),
    Origin(
        "bolts moco, queue modules",
        "bolts-moco",
        "Lightning-Universe/lightning-bolts moco_module.py, with RepresentationQueue",
        partial(bolts, newer=True),
    ),
    Origin(
        "resim-fpn",
        "resim",
        "Tete-Xiao/ReSim moco/builder.py, moco/models.py",
        partial(resim, norm=False),
    ),
    Origin(
        "resim-fpn, norms",
        "resim",
        "Tete-Xiao/ReSim moco/builder.py, moco/models.py",
        partial(resim, norm=True),
    ),
    Origin("moco v3", "moco-v3", "facebookresearch/moco-v3 moco/builder.py", moco_v3),
    Origin("simsiam", "simsiam", "facebookresearch/simsiam simsiam/builder.py", simsiam),
    Origin(
        "insdis",
        "pycontrast",
        "HobbitLong/PyContrast networks/build_backbone.py, learning/contrast_trainer.py",
        pycontrast,
    ),
    Origin(
        "infomin",
        "pycontrast",
        "HobbitLong/PyContrast networks/build_backbone.py, learning/contrast_trainer.py",
        partial(pycontrast, ema=True, jigsaw=True),
    ),
    Origin("supcon", "pycontrast", "HobbitLong/SupContrast main_supcon.py", supcon),
    Origin("pixpro", "pixpro", "zdaxie/PixPro contrast/models/PixPro.py, main_pretrain.py", pixpro),
    Origin(
        "pixpro, published",
        "pixpro",
        "zdaxie/PixPro publish_model.py",
        partial(pixpro, published=True, instance=True),
    ),
    Origin(
        "soco c4",
        "soco",
        "hologerry/SoCo contrast/models/SoCo_C4.py, mlps.py, main_pretrain.py",
        partial(soco, fpn=False),
    ),
    Origin(
        "soco fpn", "soco", "hologerry/SoCo contrast/models/SoCo_FPN.py", partial(soco, fpn=True)
    ),
    Origin("swav, released", "swav", "facebookresearch/swav src/resnet50.py, hubconf.py", swav),
    Origin(
        "swav, training", "swav", "facebookresearch/swav main_swav.py", partial(swav, training=True)
    ),
    Origin(
        "deepcluster v2",
        "swav",
        "facebookresearch/swav main_deepclusterv2.py, src/resnet50.py",
        partial(swav, clusters=True),
    ),
    Origin("torchvision", "torchvision", "pytorch/vision models", partial(flat, classes=10)),
    Origin(
        "torchvision, 2019",
        "torchvision",
        "pytorch/vision models",
        partial(flat, classes=10, format="torch-legacy"),
    ),
    Origin(
        "timm", "torchvision", "timm's resnet50", partial(flat, classes=10, format="safetensors")
    ),
    Origin(
        "timm, training",
        "torchvision",
        "timm utils/checkpoint_saver.py",
        timm_training,
    ),
    Origin(
        "barlow twins, resnet50.pth", "torchvision", "facebookresearch/barlowtwins main.py", flat
    ),
    Origin("dino, backbone", "torchvision", "facebookresearch/dino hubconf.py", flat),
    Origin(
        "simclr v1",
        "torchvision",
        "tonylins/simclr-converter convert.py",
        partial(flat, classes=10, container="state_dict"),
    ),
    Origin(
        "openmmlab, extracted",
        "torchvision",
        "open-mmlab/mmselfsup tools/model_converters/extract_backbone_weights.py",
        openmmlab_extracted,
    ),
    Origin("lightly-train export", "torchvision", "lightly-train docs, export", flat),
    Origin("barlow twins", "barlow-vicreg", "facebookresearch/barlowtwins main.py", barlow_twins),
    Origin(
        "vicreg",
        "barlow-vicreg",
        "facebookresearch/vicreg main_vicreg.py, resnet.py",
        partial(vicreg, local=False),
    ),
    Origin(
        "vicregl",
        "barlow-vicreg",
        "facebookresearch/VICRegL main_vicregl.py, utils.py",
        partial(vicreg, local=True),
    ),
    Origin("dino", "dino", "facebookresearch/dino main_dino.py, vision_transformer.py", dino),
    Origin(
        "openselfsup moco",
        "openselfsup",
        "open-mmlab/OpenSelfSup openselfsup/models/moco.py; mmcv runner/checkpoint.py",
        openselfsup_moco,
    ),
    Origin(
        "mmselfsup 0.x moco",
        "openselfsup",
        "open-mmlab/mmselfsup mmselfsup/models/algorithms/moco.py at 0c88e8d",
        partial(openselfsup_moco, neck=True),
    ),
    Origin(
        "densecl",
        "openselfsup",
        "WXinlong/DenseCL openselfsup/models/densecl.py",
        partial(openselfsup_moco, dense=True),
    ),
    Origin(
        "openselfsup byol",
        "openselfsup",
        "open-mmlab/OpenSelfSup openselfsup/models/byol.py",
        openselfsup_byol,
    ),
    Origin(
        "openselfsup simclr",
        "openselfsup",
        "open-mmlab/OpenSelfSup, peers' table row 11",
        openselfsup_plain,
    ),
    Origin(
        "mmpretrain moco",
        "mmselfsup",
        "open-mmlab/mmpretrain models/selfsup/moco.py; mmengine model/averaged_model.py, runner",
        partial(mmselfsup, momentum="encoder_k", queued=True),
    ),
    Origin(
        "mmselfsup 1.x byol",
        "mmselfsup",
        "open-mmlab/mmselfsup mmselfsup/models/algorithms/byol.py at 1e16016",
        partial(mmselfsup, momentum="target_net"),
    ),
    Origin(
        "mmselfsup 1.x mocov3",
        "mmselfsup",
        "open-mmlab/mmselfsup 1.x, peers' table row 12",
        partial(mmselfsup, momentum="momentum_encoder"),
    ),
    Origin(
        "solo-learn",
        "solo-learn",
        "vturrisi/solo-learn solo/methods/mocov2plus.py, base.py",
        partial(solo_learn, old=False),
    ),
    Origin(
        "solo-learn, old",
        "solo-learn",
        "vturrisi/solo-learn solo/methods/base.py at 008f64f",
        partial(solo_learn, old=True),
    ),
    Origin(
        "solo-learn simclr",
        "solo-learn",
        "vturrisi/solo-learn solo/methods/base.py",
        solo_learn_plain,
    ),
    Origin(
        "lightly mocov2, key_backbone",
        "lightly",
        "lightly-ai/lightly benchmarks/imagenet/resnet50/mocov2.py",
        partial(lightly_benchmark, first="backbone", second="key_backbone", names=("query", "key")),
    ),
    Origin(
        "lightly mocov2, query_backbone",
        "lightly",
        "lightly-ai/lightly benchmarks/imagenet/resnet50/mocov2.py at 00283d7",
        # There `backbone` is the momentum encoder.
        partial(
            lightly_benchmark, first="query_backbone", second="backbone", names=("query", "key")
        ),
    ),
    Origin(
        "lightly byol",
        "lightly",
        "lightly-ai/lightly benchmarks/imagenet/resnet50/byol.py",
        partial(
            lightly_benchmark,
            first="backbone",
            second="teacher_backbone",
            names=("query", "teacher"),
        ),
    ),
    Origin(
        "lightly dino",
        "lightly",
        "lightly-ai/lightly benchmarks/imagenet/resnet50/dino.py",
        partial(
            lightly_benchmark,
            first="backbone",
            second="student_backbone",
            names=("teacher", "student"),
        ),
    ),
    Origin(
        "lightly example moco",
        "lightly",
        "lightly-ai/lightly examples/pytorch_lightning/moco.py",
        partial(
            lightly_example, first="backbone", second="backbone_momentum", names=("query", "key")
        ),
    ),
    Origin(
        "lightly example dino",
        "lightly",
        "lightly-ai/lightly examples/pytorch_lightning/dino.py",
        partial(
            lightly_example,
            first="teacher_backbone",
            second="student_backbone",
            names=("teacher", "student"),
        ),
    ),
    Origin(
        "lightly, split norms",
        "lightly",
        "lightly-ai/lightly lightly/models/batchnorm.py",
        partial(lightly_splits, cifar=False),
    ),
    Origin(
        "vissl, training",
        "vissl",
        "facebookresearch/vissl utils/checkpoint.py, models/trunks/resnext.py",
        vissl_training,
    ),
    Origin(
        "vissl moco, training",
        "vissl",
        "facebookresearch/vissl losses/moco_loss.py",
        partial(vissl_training, moco=True),
    ),
    Origin(
        "vissl, model_state_dict",
        "vissl",
        "facebookresearch/vissl extra_scripts/convert_vissl_to_torchvision.py",
        partial(vissl_converted, container="model_state_dict"),
    ),
    Origin(
        "vissl, flat",
        "vissl",
        "facebookresearch/vissl extra_scripts/convert_vissl_to_torchvision.py",
        vissl_converted,
    ),
    Origin(
        "vissl, base_model",
        "vissl",
        "facebookresearch/vissl, peers' table row 16",
        partial(vissl_converted, container="model", prefix="base_model._feature_blocks."),
    ),
    Origin(
        "huggingface classifier",
        "huggingface",
        "huggingface/transformers models/resnet/modeling_resnet.py",
        partial(huggingface, classifier=True),
    ),
    Origin(
        "huggingface model.bin",
        "huggingface",
        "huggingface/transformers models/resnet/modeling_resnet.py",
        partial(huggingface, classifier=False, format="torch"),
    ),
    Origin(
        "simclr v2",
        "simclr-v2",
        "Separius/SimCLRv2-Pytorch convert.py, resnet.py",
        simclr_v2,
        small="resnet50",
    ),
    Origin(
        "detectron2 backbone pickle",
        "detectron2",
        "facebookresearch/moco detection/convert-pretrain-to-detectron2.py",
        partial(detectron2_backbone, format="pickle"),
    ),
    Origin(
        "detectron2 backbone, torch.save",
        "detectron2",
        "Tete-Xiao/ReSim detection/convert-pretrain-to-detectron2.py",
        partial(detectron2_backbone, format="torch"),
    ),
    Origin(
        "detectron2 c4",
        "detectron2",
        "Detectron2's own build_model",
        partial(detectron2_model, target="c4"),
        small="resnet50",
        needs=_D2,
        given=("imagenet", False),
    ),
    Origin(
        "detectron2 c4 of moco",
        "detectron2",
        "facebookresearch/moco detection/train_net.py; Detectron2's own build_model",
        partial(detectron2_model, target="c4", extra=True),
        small="resnet50",
        needs=_D2,
        given=("imagenet", False),
    ),
    Origin(
        "detectron2 fpn, frozen norms",
        "detectron2",
        "Detectron2's own build_model",
        partial(detectron2_model, target="fpn", norm="FrozenBN"),
        small="resnet50",
        needs=_D2,
        given=("imagenet", False),
    ),
    Origin(
        "detectron2 dc5",
        "detectron2",
        "Detectron2's own build_model",
        partial(detectron2_model, target="dc5"),
        small="resnet50",
        needs=_D2,
        given=("imagenet", False),
    ),
    Origin(
        "caffe2, affine",
        "caffe2",
        "detectron2/checkpoint/c2_model_loading.py",
        partial(caffe2, affine=True),
        small="resnet50",
        given=("caffe", True),
    ),
    Origin(
        "caffe2, statistics",
        "caffe2",
        "facebookresearch/detectron2 issues 1698, 195: the names that its logs list",
        partial(caffe2, affine=False),
        small="resnet50",
        given=("caffe", True),
    ),
    Origin(
        "caffe2, detection",
        "caffe2",
        "detectron2/checkpoint/detection_checkpoint.py",
        partial(caffe2, affine=True, blobs=True),
        small="resnet50",
        given=("caffe", True),
    ),
    Origin(
        "mmdet fpn",
        "mmdet",
        "open-mmlab/mmdetection; limbo0000/InstanceLoc transfer/detection/convert_pretrained.py",
        partial(mmdet, c4=False),
    ),
    Origin(
        "mmdet c4",
        "mmdet",
        "open-mmlab/mmdetection mmdet/models/roi_heads/shared_heads/res_layer.py",
        partial(mmdet, c4=True),
    ),
    Origin(
        "mmdet 3.x fpn",
        "mmdet",
        "open-mmlab/mmdetection; mmengine runner",
        partial(mmdet, c4=False, engine=True),
    ),
    Origin(
        "moco cifar",
        "moco-cifar",
        "facebookresearch/moco colab/moco_cifar10_demo.ipynb",
        moco_cifar,
        arch="resnet18",
    ),
)

REFUSED = (
    Refusal("cmc", "HobbitLong/PyContrast networks/build_backbone.py", cmc, r"encoder1|channels"),
    Refusal(
        "resnet50d of timm", "timm models/resnet.py", partial(deep_stem, mmcls=False), r"stem|conv1"
    ),
    Refusal(
        "ResNetV1d of mmcls",
        "open-mmlab/mmpretrain models/backbones/resnet.py",
        partial(deep_stem, mmcls=True),
        r"stem|conv1",
    ),
    Refusal(
        "simclr v2 sk", "Separius/SimCLRv2-Pytorch resnet.py", selective_kernels, r"stem|kernel"
    ),
    Refusal(
        "vit of moco v3",
        "facebookresearch/moco-v3 vits.py",
        partial(vit, "moco-v3"),
        r"transformer",
    ),
    Refusal("vit of dino", "facebookresearch/dino", partial(vit, "dino"), r"transformer"),
    Refusal(
        "vit of timm", "timm models/vision_transformer.py", partial(vit, "timm"), r"transformer"
    ),
    Refusal("heads alone", "made up", headless, r"no ResNet backbone"),
    Refusal("two that differ", "made up", two_networks, r"net_a\b.*net_b\b"),
    Refusal(
        "solo-learn of cifar",
        "vturrisi/solo-learn solo/methods/base.py",
        partial(solo_learn, "resnet18", old=True, stem="cifar"),
        r"3x3|CIFAR|cifar",
        loads=True,
    ),
    Refusal(
        "lightly of cifar, split norms",
        "lightly-ai/lightly lightly/models/resnet.py, batchnorm.py",
        partial(lightly_splits, "resnet18", cifar=True),
        r"3x3|CIFAR|cifar",
        loads=True,
    ),
    Refusal(
        "moco of cifar",
        "facebookresearch/moco colab/moco_cifar10_demo.ipynb",
        partial(moco_cifar, "resnet18"),
        r"3x3|CIFAR|cifar",
        loads=True,
    ),
)
