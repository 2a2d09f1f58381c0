"""Image files as RGB pixels, as a person who opens them would expect to see them."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

try:
    import cv2
except ImportError:  # a library of choice: what it does, Pillow does too
    cv2 = None  # type: ignore[assignment]

VERSION = 1  # of what is decoded how; verdicts on files are remembered under it
PAPER = "white"  # what lies behind transparent pixels
JPEG_BEGINS, JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"
AS_IT_LIES = 0 if cv2 is None else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION

# Photographs of real cameras and editors carry long texts (colour profiles, editing histories);
# Pillow refuses a PNG with more than 1 MB of them.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20
PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20

# EXIF's orientation tells how the camera was held.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(Exception):
    """The bytes are no image that can be shown; the message says why, the same every time."""


def decode(data: bytes) -> Image.Image:
    """Decode a file's bytes to RGB.

    Gray, palettes and CMYK become colours; 16 bits are scaled to 8 and not clipped; what is
    transparent lies on white; of an animation the first frame is taken; a camera's orientation is
    undone. Colour profiles are not applied.

    Raises:
        Undecodable: it is no image, cut short, or beyond Pillow's limit of pixels.
    """
    with _reasons(data), Image.open(io.BytesIO(data)) as image:
        image.load()
        return _upright(_to_rgb(image), _orientation(image))
    raise AssertionError("unreachable")


def decode_array(data: bytes) -> NDArray[np.uint8]:
    """Decode a file's bytes to the pixels of `decode`, (H, W, 3), by the fastest decoder at hand.

    OpenCV's takes three quarters of Pillow's time for a whole, upright JPEG of three colours, and
    gives the same bytes; everything else, and what it cannot read, is Pillow's.

    Raises:
        Undecodable: as `decode`.
    """
    if cv2 is not None and data[:2] == JPEG_BEGINS and data[-2:] == JPEG_ENDS:
        with _reasons(data), Image.open(io.BytesIO(data)) as image:
            upright = _orientation(image) not in TURNS
            if image.mode == "RGB" and upright:
                found = cv2.imdecode(np.frombuffer(data, np.uint8), AS_IT_LIES)
                if found is not None:
                    return np.asarray(found, np.uint8)
    return np.array(decode(data))


def fault_of(data: bytes, min_side: int = 1) -> str:
    """Say why a file cannot be used; nothing if it can.

    JPEGs are decoded at an eighth of their size: that reads all of their bytes too, in half the
    time.

    Args:
        data: the file's bytes.
        min_side: the least width and height, in pixels.
    """
    try:
        with _reasons(data), Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.draft(None, (1, 1))
            image.load()
            if image.mode not in _PLAIN:
                _to_rgb(image)
    except Undecodable as error:
        return str(error)
    small = min(width, height) < min_side
    return f"is {width} x {height} pixels, below min_side {min_side}" if small else ""


_PLAIN = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"})


class _reasons:
    """Turns whatever a decoder raises into `Undecodable`, and keeps its warnings quiet."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        if not self.data:
            raise Undecodable("is empty")
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(kind, error, trace)  # type: ignore[arg-type]
        if isinstance(error, UnidentifiedImageError):  # its words hold an address in memory
            raise Undecodable("is no image") from error
        # Decoders have no closed list of what a damaged file raises.
        if isinstance(error, Exception) and not isinstance(error, (MemoryError, Undecodable)):
            raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, PAPER), shown).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale gray values of more than 8 bits to 0..255.

    Sixteen bits lose their low byte, as Pillow's 16-bit colours do; floats of 0..1 are stretched to
    all of the range, and anything else is stretched from its own least to its largest value.
    """
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise Undecodable("holds values that are not finite")
    whole = values.dtype.kind in "iu"
    if whole and low >= 0 and high < 1 << 16:
        return (values >> 8).astype(np.uint8)
    if not whole and low >= 0 and high <= 1:
        low, high = 0, 1
    span = max(float(high) - float(low), 1e-12)
    stretched: np.ndarray = (values.astype(np.float64) - low) * (255 / span)
    return stretched.round().astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels beside it
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
