"""Views of a whole batch, on the device where the encoders are.

Each image has its own parameters, and its own order of the jitter: at each place of that order the
views that have the same change there are changed together. Values are whole numbers 0..255 in
float32, cut off after each change as Pillow's are, so that every change equals Pillow's but for
rounding.

Legend: B: views of a batch; S: side of a view, px; n: views that have a change at a place; K: taps
of a blur's kernel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.blur import blur_kernel
from pretrain.views import Drawn

Box = tuple[int, int, int, int]  # top, left, height, width; px
LUMA = (0.299, 0.587, 0.114)


def realise(images: Sequence[Tensor] | Tensor, views: Sequence[Drawn], size: int) -> Tensor:
    """Make a view of each image.

    Args:
        images: B decoded images (H, W, 3), RGB uint8, on the device: each of its own size, or all
            of one size in one tensor.
        views: B, what is done to each.
        size: S.

    Returns:
        (B, 3, S, S), float32, whole numbers 0..255.
    """
    if isinstance(images, Tensor):
        x = _resized_together(images, [view.box for view in views], size)
    else:
        x = torch.stack([_resized(i, v.box, size) for i, v in zip(images, views, strict=True)])
    plan = _plan(views)
    if not plan:
        return x
    # One message to the device for all places: which views, and how strong.
    members = torch.tensor([m for _, own in plan for m, _ in own]).to(x.device, non_blocking=True)
    strengths = torch.tensor([s for _, own in plan for _, s in own], dtype=torch.float32)
    counts = [len(own) for _, own in plan]
    on_device = strengths.to(x.device, non_blocking=True).split(counts)
    for (name, own), index, strength in zip(plan, members.split(counts), on_device, strict=True):
        part = x.index_select(0, index)
        if name == "blur":
            changed = _blur(part, [sigma for _, sigma in own])
        else:
            changed = CHANGES[name](part, strength[:, None, None, None])
        x.index_copy_(0, index, changed)
    return x


def _plan(views: Sequence[Drawn]) -> list[tuple[str, list[tuple[int, float]]]]:
    """List (change, its views with their strengths), place after place of the views' orders."""
    plan = []
    for place in range(max((len(view.changes) for view in views), default=0)):
        groups: dict[str, list[tuple[int, float]]] = {}
        for index, view in enumerate(views):
            if place < len(view.changes):
                name, strength = view.changes[place]
                groups.setdefault(name, []).append((index, strength))
        plan += list(groups.items())
    return plan


def _resized(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut (3, S, S) out of (H, W, 3), with Pillow's antialiased bilinear filter."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    small = functional.interpolate(
        crop, (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return small[0].round().clamp(0, 255)


def _resized_together(images: Tensor, boxes: Sequence[Box], size: int) -> Tensor:
    """Cut (B, 3, S, S) out of (B, H, W, 3) by two products with each view's own filters."""
    _, height, width, _ = images.shape
    on_device = torch.tensor(boxes).to(images.device, non_blocking=True)
    top, left, rows, columns = on_device.float().unbind(1)
    x = images.permute(0, 3, 1, 2).float()
    x = x.flatten(1, 2) @ _filters(left, columns, width, size).mT  # (B, 3H, S)
    x = torch.matmul(_filters(top, rows, height, size)[:, None], x.unflatten(1, (3, height)))
    return x.round().clamp(0, 255)


def _filters(first: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Return what each place of a view takes of each place of its image, (B, S, full).

    Pillow's antialiased bilinear filter is a triangle, as wide as the crop is shrunk, that ends at
    the crop's border.

    Args:
        first: (B,) where the crop begins along this side, px.
        length: (B,) of the crop, px.
        full: the image's side, px.
        size: S.
    """
    scale = (length / size)[:, None]
    centre = scale * (torch.arange(size, device=first.device) + 0.5)  # (B, S), of the crop
    place = torch.arange(full, device=first.device) + 0.5 - first[:, None]  # (B, full)
    far = (place[:, None] - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    inside = (place > 0) & (place < length[:, None])
    weights = (1 - far).clamp(min=0) * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _luma(x: Tensor) -> Tensor:
    """Return Pillow's gray, (n, 1, S, S)."""
    weights = x.new_tensor(LUMA)[:, None, None]
    return (x * weights).sum(1, keepdim=True).add(0.5).floor()


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (other + factor * (x - other)).clamp(0, 255).floor()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, 0.0, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean(dim=(1, 2, 3), keepdim=True).add(0.5).floor()
    return _blend(x, mean, factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x), factor)


def _gray(x: Tensor, _: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def _flip(x: Tensor, _: Tensor) -> Tensor:
    return x.flip(-1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue, cut off to a byte first, in its steps, as torchvision does on Pillow's bytes.

    With h the hue in sixths of a turn, a channel is v (1 - s t), where t falls from 1 to 0 in the
    sixth before the channel's own third, stays at 0 over two sixths, and rises again.
    """
    most, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    span = most - least
    safe = torch.where(span == 0, torch.ones_like(span), span)
    r, g, b = x.split(1, dim=1)
    sixth = torch.where(
        most == r, (g - b) / safe, torch.where(most == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    byte = (sixth.remainder(6) * (255 / 6)).floor()
    hue = (byte + (turns * 255).trunc()).remainder(256) * (6 / 255)
    starts = x.new_tensor((5.0, 3.0, 1.0))[:, None, None]  # of red, green, blue
    k = (starts + hue).remainder(6)
    depth = torch.minimum(k, 4 - k).clamp(0, 1)
    return (most - span * depth).round()


def _blur(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur each view by a sigma of its own, pixels: rows, then columns, in one kernel each."""
    kernels = [torch.from_numpy(blur_kernel(sigma)) for sigma in sigmas]
    taps = max(len(kernel) for kernel in kernels)
    padded = [functional.pad(k, ((taps - len(k)) // 2,) * 2) for k in kernels]
    weights = torch.stack(padded).repeat_interleave(3, dim=0).to(x.device, non_blocking=True)
    count, size = len(x), x.shape[-1]
    flat = x.reshape(1, 3 * count, size, size)
    half = taps // 2
    rows = functional.pad(flat, (half, half, 0, 0), mode="replicate")
    flat = functional.conv2d(rows, weights[:, None, None, :], groups=3 * count)
    columns = functional.pad(flat, (0, 0, half, half), mode="replicate")
    flat = functional.conv2d(columns, weights[:, None, :, None], groups=3 * count)
    return flat.view_as(x).round().clamp(0, 255)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "gray": _gray,
    "flip": _flip,
}
