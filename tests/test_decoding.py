import io
import re

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFilter, ImageOps

from pretrain.decoding import Undecodable, decode, decode_array, fault_of
from tests.odd_images import animated, broken_files, encode, in_16_bits, odd_files, turned


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """No side and no corner like another."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return ImageOps.autocontrast(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4)))


def far(one: Image.Image, two: Image.Image) -> float:
    """The mean difference of two images' values, of 255."""
    assert one.size == two.size
    assert one.mode == "RGB"
    return float(np.abs(np.asarray(one, float) - np.asarray(two.convert("RGB"), float)).mean())


def test_plain_rgb_is_what_pillow_reads(photo):
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        data = encode(photo, kind)
        assert far(decode(data), Image.open(io.BytesIO(data))) == 0


VARIANTS = {
    "plain": {},
    "fine colours": {"subsampling": "4:4:4"},
    "half colours": {"subsampling": "4:2:2"},
    "progressive": {"progressive": True, "quality": 95},
    "bad": {"quality": 3},
    "restarts": {"restart_marker_rows": 2},
    "profile": {"icc_profile": b"some" * 99},
    "RGB kept": {"keep_rgb": True},
    "EXIF": {"exif": b"Exif\0\0nothing"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", [1, 17, 320])
def test_the_fast_decoder_gives_the_same_pixels(photo, variant, side):
    file = io.BytesIO()
    photo.resize((side, side + 3)).save(file, "JPEG", **VARIANTS[variant])
    fast = decode_array(file.getvalue())
    assert fast.flags.writeable
    assert np.array_equal(fast, decode(file.getvalue()))


def test_the_fast_decoder_leaves_odd_files_to_pillow(photo):
    turned, gray, cmyk = io.BytesIO(), io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(turned, "JPEG", exif=exif)
    photo.convert("L").save(gray, "JPEG")
    photo.convert("CMYK").save(cmyk, "JPEG")
    for file in (turned, gray, cmyk):
        assert np.array_equal(decode_array(file.getvalue()), decode(file.getvalue()))
    whole = turned.getvalue()
    for cut in (whole[: len(whole) // 2], whole[:40], b"", b"no image", whole[:2] + whole[-2:]):
        with pytest.raises(Undecodable) as slow:
            decode(cut)
        with pytest.raises(Undecodable, match=f"^{re.escape(str(slow.value))}$"):
            decode_array(cut)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_every_colour_space_becomes_the_same_picture_in_rgb(photo, mode):
    wanted = photo.convert(mode)
    kind = "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG"
    assert far(decode(encode(wanted, kind, quality=95)), wanted) < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_and_not_clipped(photo, kind):
    gray = np.asarray(photo.convert("L"))
    data = encode(Image.fromarray(gray.astype(np.uint16) * 257), kind)
    assert far(decode(data), photo.convert("L")) == 0
    dark = encode(Image.fromarray(np.full((9, 9), 300, np.uint16)), kind)
    assert np.asarray(decode(dark)).max() == 1  # Pillow's convert("RGB") gives 255
    assert far(decode(in_16_bits(photo)), photo.convert("L")) == 0


def test_floats_and_long_numbers_are_stretched(photo):
    gray = np.asarray(photo.convert("L"), np.float32)
    for values in (gray / 255, gray.astype(np.int32) * 70_000 - 5):
        shown = np.asarray(decode(encode(Image.fromarray(values), "TIFF")), float)[..., 0]
        wanted = gray if values.dtype == np.float32 else (gray - gray.min()) * 255 / np.ptp(gray)
        assert np.abs(shown - wanted).max() < 1
    broken = np.full((9, 9), np.nan, np.float32)
    with pytest.raises(Undecodable, match="not finite"):
        decode(encode(Image.fromarray(broken), "TIFF"))


def test_what_is_transparent_lies_on_white(photo):
    clear = photo.copy()
    clear.putalpha(0)
    left = Image.new("L", photo.size, 255)
    left.paste(0, (0, 0, 32, 48))
    half = photo.copy()
    half.putalpha(left)
    black = Image.new("P", (20, 20), 0)
    for image, options in (
        (clear, {}),
        (clear.convert("LA"), {}),
        (black, {"transparency": 0}),
        (Image.new("L", (20, 20), 7), {"transparency": 7}),
        (Image.new("RGB", (20, 20), (1, 2, 3)), {"transparency": (1, 2, 3)}),
    ):
        assert np.asarray(decode(encode(image, "PNG", **options))).min() == 255, image.mode
    shown = np.asarray(decode(encode(half, "PNG")))
    assert shown[:, :32].min() == 255
    assert np.array_equal(shown[:, 32:], np.asarray(photo)[:, 32:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_camera_that_was_turned_gives_upright_pictures(photo, kind):
    back = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),  # held with its right side down
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(270, expand=True),
    }
    for orientation, store in back.items():
        data = turned(store(photo), orientation, kind)
        assert far(decode(data), photo) < (0.01 if kind in {"PNG", "TIFF"} else 4), orientation


def test_a_damaged_exif_block_hides_no_picture(photo):
    data = encode(photo, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert far(decode(data), photo) < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(photo, kind):
    data = animated([photo, photo.rotate(180)], kind)
    assert far(decode(data), photo) < 10
    assert far(decode(data), photo.rotate(180)) > 30


def test_a_png_may_carry_long_texts(photo):
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("history", "edited " * 500_000, zip=True)
    assert far(decode(encode(photo, "PNG", pnginfo=texts)), photo) == 0


def test_odd_files_can_be_used_and_broken_ones_say_why(photo):
    for name, data in odd_files(photo).items():
        assert fault_of(data, 8) == "", name
        assert decode(data).mode == "RGB"
    faults = {name: fault_of(data, 8) for name, data in broken_files(photo).items()}
    assert all(faults.values()), faults
    assert faults["bad_empty.jpg"] == "is empty"
    assert faults["bad_page.jpg"] == faults["bad_zero.jpg"] == "is no image"
    assert faults["bad_pixel.png"] == "is 1 x 1 pixels, below min_side 8"
    assert "truncated" in faults["bad_cut.jpg"].lower()
    assert not [fault for fault in faults.values() if "0x" in fault]


def test_a_fault_is_found_where_decoding_fails_and_nowhere_else(photo):
    draw = np.random.default_rng(0)
    whole = [encode(photo, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    whole.append(encode(photo.resize((300, 200)), "JPEG", progressive=True))
    failed = 0
    for data in whole:
        for _ in range(40):
            end = len(data) if draw.integers(2) else draw.integers(len(data) // 2, len(data))
            bad = bytearray(data[:end])
            for place in draw.integers(0, len(bad), draw.integers(0, 4)):
                bad[place] = draw.integers(256)
            try:
                decode(bytes(bad))
                fails = False
            except Undecodable:
                fails = True
            failed += fails
            assert bool(fault_of(bytes(bad))) == fails
    assert 100 < failed < 250
