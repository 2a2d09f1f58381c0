"""Files as they lie in folders of photographs: odd ones that can be seen, and broken ones."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """A file whose EXIF says how the camera was held; its pixels are as given."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif)


def animated(images: Sequence[Image.Image], kind: str) -> bytes:
    """An animation of several frames."""
    first, *rest = images
    return encode(first, kind, save_all=True, append_images=rest, duration=100)


def in_16_bits(image: Image.Image) -> bytes:
    """A gray PNG of 16 bits."""
    gray = np.asarray(image.convert("L")).astype(np.uint16)
    return encode(Image.fromarray(gray * 257), "PNG")


def odd_files(photo: Image.Image) -> dict[str, bytes]:
    """Ten files that a person would open without a thought, none of them 8-bit RGB upright."""
    photo = photo.convert("RGB")
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    clear = photo.copy()
    clear.putalpha(photo.convert("L"))
    return {
        "odd_cmyk.jpg": encode(photo.convert("CMYK"), "JPEG"),
        "odd_16bit.png": in_16_bits(photo),
        "odd_palette.png": encode(palette, "PNG"),
        "odd_palette_clear.png": encode(palette, "PNG", transparency=3),
        "odd_clear.png": encode(clear, "PNG"),
        "odd_turned.jpg": turned(photo, 6),
        "odd_gray.jpg": encode(photo.convert("L"), "JPEG"),
        "odd_animated.gif": animated([photo, photo.rotate(90)], "GIF"),
        "odd_animated.webp": animated([photo, photo.rotate(90)], "WEBP"),
        "odd_small.png": encode(photo.resize((9, 11)), "PNG"),
    }


def broken_files(photo: Image.Image) -> dict[str, bytes]:
    """Ten files that are no images, or not worth one."""
    photo = photo.convert("RGB")
    jpeg, png = encode(photo, "JPEG"), encode(photo, "PNG")
    return {
        "bad_cut.jpg": jpeg[: len(jpeg) // 2],
        "bad_cut.png": png[: len(png) // 2],
        "bad_empty.jpg": b"",
        "bad_page.jpg": b"<html>404 Not Found</html>",
        "bad_header.png": png[:20],
        "bad_checksum.png": png[:30] + bytes([png[30] ^ 1]) + png[31:],
        "bad_gif.gif": animated([photo, photo], "GIF")[:40],
        "bad_zero.jpg": bytes(5000),
        "bad_pixel.png": encode(photo.resize((1, 1)), "PNG"),
        "bad_line.png": encode(photo.resize((50, 2)), "PNG"),
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
