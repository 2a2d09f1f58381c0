"""What a backbone expects of an image: channel order, mean, standard deviation.

Values are in RGB order on the scale 0..1, as torchvision states them; Detectron2 wants them on the
scale 0..255 and in the order of its INPUT.FORMAT.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from convert.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORDERS = ("RGB", "BGR")


@dataclass(frozen=True)
class Pixels:
    """The statistics that an image is normalised with before it enters a backbone."""

    channel_order: str = "RGB"  # the order of the stem's three input channels
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def from_detectron2(cls, order: str, mean: Sequence[float], std: Sequence[float]) -> "Pixels":
        """Read Detectron2's INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD."""
        step = 1 if order == "RGB" else -1
        scaled = (
            tuple(round(value / 255, 6) for value in values[::step]) for values in (mean, std)
        )
        return cls(order, *scaled)

    def detectron2(self) -> dict[str, object]:
        """Return the Detectron2 settings that feed this backbone what it was trained on."""
        return {
            "INPUT.FORMAT": self.channel_order,
            "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in self._ordered(self.mean)],
            "MODEL.PIXEL_STD": [round(255 * value, 3) for value in self._ordered(self.std)],
        }

    def _ordered(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values if self.channel_order == "RGB" else values[::-1]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in v) for v in (self.mean, self.std))
        return f"{self.channel_order}, mean {mean}, std {std} (RGB order, of 0..1)"


IMAGENET_PIXELS = Pixels()
UNIT_PIXELS = Pixels("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # images in [0, 1], as SimCLR's
# Caffe's, as Detectron2 states them: BGR on the scale 0..255, means only.
CAFFE_PIXELS = Pixels.from_detectron2("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
PRESETS = {"imagenet": IMAGENET_PIXELS, "unit": UNIT_PIXELS, "caffe": CAFFE_PIXELS}


def parse_pixels(text: str) -> Pixels:
    """Read what `--pixels` says: a preset, or `RGB:0.485,0.456,0.406:0.229,0.224,0.225`.

    Mean and std are in RGB order on the scale 0..1, whatever the order of the channels.

    Raises:
        UserError: it is neither.
    """
    if text in PRESETS:
        return PRESETS[text]
    try:
        order, *values = text.split(":")
        mean, std = (tuple(float(number) for number in part.split(",")) for part in values)
        if order in ORDERS and len(mean) == len(std) == 3 and min(std) > 0:
            return Pixels(order, mean, std)
    except ValueError:
        pass
    raise UserError(
        f"--pixels {text}: want {', '.join(PRESETS)}, or ORDER:MEAN:STD as "
        "RGB:0.485,0.456,0.406:0.229,0.224,0.225 (RGB order, of 0..1)"
    )
