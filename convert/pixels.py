"""What a backbone expects of an image: channel order, mean, standard deviation.

Values are in RGB order on the scale 0..1, as torchvision states them; Detectron2 wants them on the
scale 0..255 and in the order of its INPUT.FORMAT.
"""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """The statistics that an image is normalised with before it enters a backbone."""

    channel_order: str = "RGB"  # the order of the stem's three input channels
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def detectron2(self) -> dict[str, object]:
        """Return the Detectron2 settings that feed this backbone what it was trained on."""
        return {
            "INPUT.FORMAT": self.channel_order,
            "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in self._ordered(self.mean)],
            "MODEL.PIXEL_STD": [round(255 * value, 3) for value in self._ordered(self.std)],
        }

    def _ordered(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values if self.channel_order == "RGB" else values[::-1]


IMAGENET_PIXELS = Pixels()
