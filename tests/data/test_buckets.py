"""Buckets: as many distinct shapes as asked, of about one area, and each picture in the one that crops least of it."""

import math

import numpy as np
import pytest
from PIL import Image

from latentfm.data.buckets import AREA_TOLERANCE, Buckets
from latentfm.data.images import Transform, apply
from latentfm.errors import InputError

CASES = [
    (1024, 1024, 16, 9, 2.0, 3072), (1024, 1024, 64, 5, 2.0, 2048), (768, 512, 16, 6, 2.0, 1536), (512, 768, 32, 4, 3.0, 1536),
    (512, 512, 16, 2, 2.0, 1024), (64, 64, 16, 5, 2.0, 256), (256, 256, 16, 12, 4.0, 1024), (1024, 512, 16, 3, 2.0, 1536),
]  # fmt: skip


@pytest.mark.parametrize("width, height, multiple, count, aspect, largest", CASES)
def test_shapes_are_what_was_asked_for(width, height, multiple, count, aspect, largest):
    shapes = Buckets.make(width, height, multiple, count, aspect, largest).shapes
    assert len(set(shapes)) == len(shapes) == count and (width, height) in shapes
    for w, h in shapes:
        assert w % multiple == 0 and h % multiple == 0 and max(w, h) <= largest
        assert abs(w * h / (width * height) - 1) <= AREA_TOLERANCE
        assert 1 / aspect <= w / h <= aspect
    aspects = [w / h for w, h in shapes]
    assert aspects == sorted(set(aspects))


@pytest.mark.parametrize("count, aspect", [(3, 2.0), (5, 2.0), (7, 3.0), (9, 4.0)])
def test_aspects_are_spread_evenly_on_a_log_scale_and_mirror_each_other(count, aspect):
    shapes = Buckets.make(1024, 1024, 16, count, aspect, 4096).shapes
    wanted = np.linspace(-math.log(aspect), math.log(aspect), count)
    assert np.abs(np.log([w / h for w, h in shapes]) - wanted).max() < 0.03
    assert [(h, w) for w, h in reversed(shapes)] == list(shapes)


def test_an_even_number_has_one_more_where_there_is_more_room():
    assert [w > h for w, h in Buckets.make(512, 512, 16, 4, 2.0, 1024).shapes] == [False, False, False, True]
    wide = Buckets.make(768, 512, 16, 4, 2.0, 1536).shapes
    assert wide.index((768, 512)) == 2 and wide[3][0] / wide[3][1] > 1.9


def test_one_bucket_is_the_size_alone_whatever_its_aspect():
    assert Buckets.make(1024, 256, 16, 1, 2.0, 1024).shapes == ((1024, 256),)
    assert Buckets.make(1024, 256, 16).shapes == ((1024, 256),)


def test_what_cannot_be_is_refused_with_the_number_that_can():
    with pytest.raises(InputError, match=r"no 6 shapes of about 64 x 64 .* only 5; take 5 buckets or fewer"):
        Buckets.make(64, 64, 16, 6, 2.0, 256)
    assert len(Buckets.make(64, 64, 16, 5, 2.0, 256).shapes) == 5
    with pytest.raises(InputError, match="only 1;"):
        Buckets.make(512, 512, 16, 2, 1.0, 1024)
    with pytest.raises(InputError, match="only 13;"):
        Buckets.make(512, 512, 16, 14, 2.0, 512)  # largest counts: with 512 a side only
    pairs = {(w, h) for w in range(16, 513, 16) for h in range(16, 513, 16) if abs(w * h / 512**2 - 1) <= AREA_TOLERANCE}
    assert len({w / h for w, h in pairs}) == 13 == len(Buckets.make(512, 512, 16, 13, 2.0, 512).shapes)
    with pytest.raises(InputError, match=r"aspects up to 2 do not reach 1024 x 256.* allow 4 or more"):
        Buckets.make(1024, 256, 16, 3, 2.0, 1024)
    with pytest.raises(InputError, match="multiples of 16, at most 512"):
        Buckets.make(520, 512, 16, 3, 2.0, 512)
    for shapes in ((), ((8, 8), (8, 8)), ((0, 8),)):
        with pytest.raises(ValueError, match="distinct shapes"):
            Buckets(shapes)


def test_a_picture_goes_where_least_of_it_is_cropped():
    buckets = Buckets.make(512, 512, 16, 7, 2.0, 1024)
    sizes = np.random.default_rng(0).integers(1, 2000, (500, 2))
    for (width, height), index, lost in zip(sizes.tolist(), *(found.tolist() for found in buckets.of(sizes)), strict=True):
        shares = [1 - min(width * h, height * w) / max(width * h, height * w) for w, h in buckets.shapes]
        assert index == shares.index(min(shares))
        assert lost == min(shares) and 0 <= min(shares) < 1
    own = buckets.of(3 * np.array(buckets.shapes))
    assert own[0].tolist() == list(range(len(buckets.shapes))) and not own[1].any()
    assert [found.shape for found in buckets.of(np.zeros((0, 2), np.int64))] == [(0,), (0,)]


def test_ties_go_to_the_first():
    buckets = Buckets(((100, 400), (400, 100)))
    for each in (buckets, Buckets(buckets.shapes[::-1])):
        assert each.of([(77, 77)])[0].tolist() == [0]


def test_the_crop_is_that_of_the_transform():
    """A picture of two halves: what the crop leaves of them, measured on the pixels."""
    _, lost = Buckets(((64, 64),)).of([(128, 64), (512, 256)])
    assert lost[0] == 0.5
    ramp = Image.fromarray(np.tile(np.repeat(np.arange(256, dtype=np.uint8), 2), (256, 1))[..., None].repeat(3, -1))  # 512 x 256
    seen = apply(ramp, Transform(64, 64))[:, :, 0].astype(int)
    assert (seen.max() - seen.min()) / 256 == pytest.approx(1 - lost[1], abs=0.02)
