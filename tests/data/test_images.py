"""open_rgb on the files people really have, apply's geometry, and keys and digests that notice every change."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from latentfm.data import images
from latentfm.data.images import Transform, UnreadableImage, apply, digest, load, open_rgb, to_tensor, upright_size
from latentfm.errors import InputError


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def opened(path):
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# What the pixels mean


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_lossless_rgb_is_exact(tmp_path, suffix):
    pixels = noise(5, 7)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(opened(tmp_path / f"a.{suffix}"), pixels)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "gif"])
def test_lossy_formats_open(tmp_path, suffix):
    Image.new("RGB", (32, 16), (200, 40, 90)).save(tmp_path / f"a.{suffix}")
    pixels = opened(tmp_path / f"a.{suffix}")
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - (200, 40, 90)).max() <= 8


def test_the_content_decides_not_the_extension(tmp_path):
    pixels = noise(4, 4)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(opened(tmp_path / "a.jpg"), pixels)


# The stored picture for each orientation, from the upright one, as the EXIF standard words it: where the stored
# row 0 and column 0 are in the upright picture (1: top, left; 2: top, right; 3: bottom, right; ...).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),  # row 0 is the left side, column 0 the top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # the right side, the top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # the right side, the bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # the left side, the bottom
}


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    upright = noise(3, 5)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif)
    assert np.array_equal(opened(tmp_path / f"a.{suffix}"), upright)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp", "avif"])
@pytest.mark.parametrize("orientation", [None, *STORED, 9])
def test_the_upright_size_is_that_of_the_upright_picture(tmp_path, orientation, suffix):
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(noise(24, 40)).save(path, exif=exif)
    assert upright_size(path) == open_rgb(path).size
    assert upright_size(tmp_path / "no file", path.read_bytes()) == open_rgb(path).size


def test_the_upright_size_of_a_png_knows_the_exif_behind_its_pixels(tmp_path):
    exif, path = Image.Exif(), tmp_path / "a.png"
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise(3, 5)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    assert start < data.index(b"IDAT")
    path.write_bytes(data.replace(chunk, b"").replace(data[-12:], chunk + data[-12:]))
    assert upright_size(path) == open_rgb(path).size == (3, 5)


def test_the_upright_size_decodes_nothing(tmp_path, monkeypatch):
    for suffix in ("png", "jpg"):
        Image.fromarray(noise(30, 20)).save(tmp_path / f"a.{suffix}")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(images.Image.Image, "load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert {upright_size(tmp_path / name) for name in ("a.png", "a.jpg", "cut.png")} == {(20, 30)}


@pytest.mark.parametrize("content, reason", [
    (b"", "the file is empty"), (b"no picture", "not a picture in PNG"), (b"\x89PNG\r\n\x1a\n", ""),
])  # fmt: skip
def test_what_has_no_header_has_no_size(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    for data in (None, content):
        with pytest.raises(UnreadableImage, match=rf"cannot read .*a\.png: {reason}"):
            upright_size(tmp_path / "a.png", data)
    with pytest.raises(UnreadableImage, match="there is no picture .*b.png"):
        upright_size(tmp_path / "b.png")


def test_jpeg_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = np.zeros((16, 48, 3), np.uint8)
    stored[:, :16] = 255  # column 0 is the top of the upright picture
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    pixels = opened(tmp_path / "a.jpg")
    assert pixels.shape == (48, 16, 3)
    assert pixels[:16].min() > 200 and pixels[16:].max() < 50


def test_damaged_exif_and_unknown_orientation_leave_the_picture_as_stored(tmp_path):
    pixels = noise(3, 5)
    Image.fromarray(pixels).save(tmp_path / "damaged.png", exif=b"Exif\x00\x00not a TIFF header")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    Image.fromarray(pixels).save(tmp_path / "nine.png", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(opened(tmp_path / "damaged.png"), pixels)
        assert np.array_equal(opened(tmp_path / "nine.png"), pixels)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 200, 51]]], np.uint8)  # 51 / 255 = 1 / 5
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert opened(tmp_path / "rgba.png").tolist() == [[[255, 255, 255], [10, 20, 30], [204, 224, 244]]]

    la = np.array([[[0, 0], [40, 255], [0, 51]]], np.uint8)
    Image.fromarray(la).save(tmp_path / "la.png")
    assert opened(tmp_path / "la.png")[0, :, 1].tolist() == [255, 40, 204]


def test_transparent_palette_entry_or_colour_key_is_white(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "index.png", transparency=1)
    assert opened(tmp_path / "index.png").tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 51]))
    assert opened(tmp_path / "bytes.png").tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]]
    palette.save(tmp_path / "a.gif", transparency=1)
    assert opened(tmp_path / "a.gif").tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]

    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert opened(tmp_path / "rgb.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_opaque_palette_and_one_bit(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 60, 50, 40])
    palette.putdata([1, 0])
    palette.save(tmp_path / "p.png")
    assert opened(tmp_path / "p.png").tolist() == [[[60, 50, 40], [9, 8, 7]]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    assert opened(tmp_path / "one.png").tolist() == [[[255] * 3, [0] * 3]]


def test_cmyk_jpeg(tmp_path):
    # No ink is white, all the black ink is black, full cyan is cyan.
    cmyk = np.zeros((16, 48, 4), np.uint8)
    cmyk[:, 16:32, 3] = 255
    cmyk[:, 32:, 0] = 255
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
    pixels = opened(tmp_path / "a.jpg").astype(int)
    for column, colour in [(8, (255, 255, 255)), (24, (0, 0, 0)), (40, (0, 255, 255))]:
        assert np.abs(pixels[8, column] - colour).max() <= 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    grey = np.array([[0, 257, 128 * 257, 65535, 40000]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.mode.startswith("I")
    pixels = opened(tmp_path / f"a.{suffix}")
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255, 156]
    assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    Image.fromarray(np.full((2, 2), 255, np.uint16)).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").max() == 1


def test_big_endian_16_bit_grey(tmp_path):
    Image.frombytes("I;16B", (2, 1), b"\x80\x80\xff\xff").save(tmp_path / "a.tif")
    assert opened(tmp_path / "a.tif")[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 32896, 65535, -5]], np.int32), [0, 128, 255, 0]),
        (np.array([[0, 500_000, 1_000_000, -5]], np.int32), [0, 128, 255, 0]),
        (np.array([[0, 0.5, 1, -3]], np.float32), [0, 128, 255, 0]),
        (np.array([[0, 0.25, 0.5, 0]], np.float32), [0, 64, 128, 0]),
        (np.array([[0, 100, 200, 255]], np.float32), [0, 100, 200, 255]),
        (np.array([[0, 500, 1000, 250]], np.float32), [0, 128, 255, 64]),
    ],
)
def test_32_bit_integer_and_float_grey(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert opened(tmp_path / "a.tif")[0, :, 0].tolist() == expected


def test_a_float_picture_with_nan_is_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="a.tif: it holds values that are not finite"):
        open_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif"])
def test_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ["red", "blue", "lime"]]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 3
    assert (opened(tmp_path / f"a.{suffix}") == (255, 0, 0)).all()


# What cannot be read


def refusal(path):
    with pytest.raises(UnreadableImage) as caught:
        open_rgb(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert isinstance(caught.value, InputError)
    return message


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    (tmp_path / "zero.png").touch()
    assert "the file is empty" in refusal(tmp_path / "zero.png")
    (tmp_path / "text.png").write_text("a caption, not a picture\n" * 50)
    assert "not a picture in PNG, JPEG" in refusal(tmp_path / "text.png")
    assert "there is no picture" in refusal(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    assert "folder.png" in refusal(tmp_path / "folder.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(noise(64, 64)).save(whole)
    opened(whole)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal(cut)


def test_a_corrupt_png_is_refused(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[500:520] = bytes(20)
    (tmp_path / "a.png").write_bytes(data)
    refusal(tmp_path / "a.png")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_999)
    message = refusal(tmp_path / "a.png")
    assert "10000 pixels" in message and "scale it down" in message


def test_a_format_outside_the_list_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "not a picture in" in refusal(tmp_path / "a.png")


# apply


def test_a_picture_of_the_target_size_is_not_resampled():
    pixels = noise(9, 13)
    assert np.array_equal(apply(Image.fromarray(pixels), Transform(9, 13)), pixels)
    assert np.array_equal(apply(Image.fromarray(pixels), Transform(9, 13, flip=True)), pixels[:, ::-1])


@pytest.mark.parametrize("height, width", [(9, 8), (9, 13), (6, 13)])
def test_where_one_side_fits_the_other_is_cropped_centrally_without_resampling(height, width):
    pixels = noise(9, 13)
    top, left = (9 - height) // 2, (13 - width) // 2
    expected = pixels[top : top + height, left : left + width]
    assert np.array_equal(apply(Image.fromarray(pixels), Transform(height, width)), expected)


def test_scaling_covers_and_crops_the_centre():
    # The same as scaling the whole picture to 32 x 96 and keeping the middle third.
    image = Image.fromarray(noise(64, 192))
    whole = np.asarray(image.resize((96, 32), Image.Resampling.LANCZOS))
    result = apply(image, Transform(32, 32))
    assert result.shape == (32, 32, 3) and result.dtype == np.uint8
    assert np.abs(result.astype(int) - whole[:, 32:64]).max() <= 1
    soft = image.point(lambda value: 96 + value // 4)  # Pillow rounds between its two passes, and cuts off what leaves 0 to 255 there
    result, tall = (apply(each, Transform(32, 32)) for each in (soft, soft.transpose(Image.Transpose.TRANSPOSE)))
    assert np.abs(tall.astype(int) - result.swapaxes(0, 1)).max() <= 1


def test_scaling_is_lanczos_resizing():
    image = Image.fromarray(noise(40, 60))
    expected = np.asarray(image.resize((30, 20), Image.Resampling.LANCZOS))
    assert np.array_equal(apply(image, Transform(20, 30)), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (333, 17)])
@pytest.mark.parametrize("target", [(1, 1), (64, 64), (16, 128), (7, 3)])
def test_any_size_goes_to_any_size(size, target):
    image = Image.new("RGB", size, (3, 150, 250))
    for flip in (False, True):
        result = apply(image, Transform(*target, flip=flip))
        assert result.shape == (*target, 3) and result.dtype == np.uint8
        assert (result == (3, 150, 250)).all()
        assert result.flags.c_contiguous and result.flags.writeable


def test_flip_mirrors_after_the_crop():
    image = Image.fromarray(noise(20, 31))
    plain, flipped = apply(image, Transform(8, 8)), apply(image, Transform(8, 8, flip=True))
    assert np.array_equal(flipped, plain[:, ::-1])
    assert not np.array_equal(flipped, plain)


def test_apply_refuses_another_mode_and_leaves_its_input_alone():
    with pytest.raises(ValueError, match="mode L: open it with open_rgb"):
        apply(Image.new("L", (2, 2)), Transform(2, 2))
    image = Image.fromarray(noise(4, 4))
    before = image.tobytes()
    apply(image, Transform(4, 4))[:] = 0
    assert image.tobytes() == before


def test_load_is_open_then_apply(tmp_path):
    pixels = noise(40, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    transform = Transform(16, 16, flip=True)
    assert np.array_equal(load(tmp_path / "a.png", transform), apply(Image.fromarray(pixels), transform))
    Image.new("L", (1, 1), 77).save(tmp_path / "dot.png")
    assert (load(str(tmp_path / "dot.png"), transform) == 77).all()


# Tensors, keys, digests


def test_to_tensor_values_layout_and_copy():
    array = noise(3, 5)
    array[0, 0], array[0, 1] = 0, 255
    array.flags.writeable = False  # as a memory-mapped cache hands it over
    tensor = to_tensor(array)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 3, 5) and tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == [-1] * 3 and tensor[:, 0, 1].tolist() == [1] * 3
    back = ((tensor.double() + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(back, array)
    torch.testing.assert_close(tensor[2, 1, 4].item(), array[1, 4, 2] / 127.5 - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("array", [np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8), noise(2, 2, 4)])
def test_to_tensor_refuses_another_type_or_shape(array):
    with pytest.raises(ValueError, match="uint8 \\[H, W, 3\\]"):
        to_tensor(array)


def test_key_is_canonical_and_differs_with_every_setting_and_the_version(monkeypatch):
    transforms = [Transform(64, 32), Transform(32, 64), Transform(64, 32, flip=True), Transform(6, 432)]
    keys = {transform.key() for transform in transforms}
    assert len(keys) == len(transforms)
    assert Transform(64, 32, flip=1).key() == Transform(64, 32, flip=True).key()
    assert Transform(64, 32).key() == "cover-lanczos-centre v1 height=64 width=32 flip=0"
    monkeypatch.setattr(images, "TRANSFORM_VERSION", images.TRANSFORM_VERSION + 1)
    assert Transform(64, 32).key() not in keys


@pytest.mark.parametrize("sides", [(0, 4), (4, -1), (4.5, 4), ("4", 4)])
def test_a_size_that_is_no_size_is_refused(sides):
    with pytest.raises(InputError, match="(height|width) must be a whole number of pixels"):
        Transform(*sides)


def test_digest_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(bytes(3_000_000))
    assert digest(str(tmp_path / "big")) == hashlib.sha256(bytes(3_000_000)).hexdigest()
    with pytest.raises(UnreadableImage, match="gone: No such file"):
        digest(tmp_path / "gone")
