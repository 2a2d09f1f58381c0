"""The reference's recipe as it is usually written: what ours is held against, in numbers and speed.

Pillow transforms, fp32, NCHW, one tensor at a time in the momentum update, every image gathered on
every process to shuffle, DistributedDataParallel. One plain file, on purpose: nothing here is used
by the other folders, and nothing of theirs is used here.

Shapes:
    n: images on this process; N: on all
    C: length of an embedding; K: keys in the queue
"""

import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Blur:
    """A Gaussian blur whose sigma is drawn anew for every image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class TwoCrops:
    """Draws two views of an image, v2's (arXiv:2003.04297, Sec. 2) or v1's."""

    def __init__(self, size: int = 224, *, aug_plus: bool = True) -> None:
        gray = transforms.RandomGrayscale(p=0.2)
        if aug_plus:
            jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
            colour = [transforms.RandomApply([jitter], p=0.8), gray]
            colour.append(transforms.RandomApply([Blur()], p=0.5))
        else:
            colour = [gray, transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)]
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                *colour,
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return the query's and the key's view."""
        return [self.view(image), self.view(image)]


class PlainMoCo(nn.Module):
    """Algorithm 1 of arXiv:1911.05722 on processes with a batch norm each.

    Args:
        arch: torchvision's name.
        dim: C.
        K: keys in the queue, a multiple of N.
        m: momentum of f_k.
        tau: temperature.
        mlp: v2's head.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        arch: str = "resnet50",
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        tau: float = 0.2,
        *,
        mlp: bool = True,
    ) -> None:
        super().__init__()
        self.K, self.m, self.tau = K, m, tau
        self.encoder_q, self.encoder_k = (_encoder(arch, dim, mlp=mlp) for _ in range(2))
        for theta_q, theta_k in zip(
            self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True
        ):
            theta_k.data.copy_(theta_q.data)
            theta_k.requires_grad = False
        self.register_buffer("queue", functional.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor, order: Tensor | None = None) -> Tensor:
        """Return (n, 1 + K) logits, positives in column 0.

        Args:
            im_q: (n, 3, H, W).
            im_k: (n, 3, H, W).
            order: (N,) the permutation to shuffle by; None: the first process draws it.
        """
        q = functional.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for theta_q, theta_k in zip(
                self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True
            ):
                theta_k.data = theta_k.data * self.m + theta_q.data * (1 - self.m)
            everything = gather(im_k)
            if order is None:
                order = torch.randperm(len(everything), device=im_k.device)
                if dist.is_initialized():
                    dist.broadcast(order, src=0)
            k = functional.normalize(self.encoder_k(everything[_mine(order)]), dim=1)
            keys = gather(k)[torch.argsort(order)]
            k = keys[_mine(torch.arange(len(keys), device=keys.device))]
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        with torch.no_grad():
            first = int(self.queue_ptr)
            self.queue[:, first : first + len(keys)] = keys.T
            self.queue_ptr[0] = (first + len(keys)) % self.K
        return torch.cat([positive, negative], dim=1) / self.tau


def gather(x: Tensor) -> Tensor:
    """Return all processes' rows, without a gradient."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _mine(rows: Tensor) -> Tensor:
    if not dist.is_initialized():
        return rows
    return rows.view(dist.get_world_size(), -1)[dist.get_rank()]


def _encoder(arch: str, dim: int, *, mlp: bool) -> nn.Module:
    network: nn.Module = getattr(torchvision.models, arch)(num_classes=dim)
    if mlp:
        last = network.fc
        assert isinstance(last, nn.Linear)
        network.fc = nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.ReLU(), last)
    return network


def build(model: PlainMoCo, lr: float = 0.03) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap a model for its processes, and make its optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    return (
        nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    ), optimizer


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: list[Tensor],
    order: Tensor | None = None,
) -> float:
    """Take one step on this process's two views, each (n, 3, H, W); return its loss."""
    logits = model(views[0], views[1], order)
    targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = functional.cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def images_per_s(
    folder: Path, model: PlainMoCo, *, batch_size: int, size: int, steps: int, workers: int
) -> float:
    """Measure the recipe on a folder of class folders, after one step of warm-up."""
    device = next(model.parameters()).device
    images = torchvision.datasets.ImageFolder(str(folder), TwoCrops(size))
    loader = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    wrapped, optimizer = build(model)
    started, done = 0.0, -1
    while done < steps:
        for views, _ in loader:
            take_step(wrapped, optimizer, [view.to(device) for view in views])
            done += 1
            if done == 0:
                started = time.monotonic()
            if done == steps:
                break
    return steps * batch_size / (time.monotonic() - started)
