"""What an autoencoder is shown: crops, backgrounds and colours that depend on seed, epoch and id alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentfm.data.buckets import Buckets, DataPlan
from latentfm.data.images import Transform, load
from latentfm.data.inventory import Inventory
from latentfm.data.pixels import PixelReader, Variety, batches_of, crop
from latentfm.data.sources import Columns, read_folder
from latentfm.errors import InputError

EVERYTHING = Variety(flip=True, random_crop=True, random_background=0.5, permute_colours=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of 20 x 28 whose pixels tell where they are: red across, green down; half of them transparent at the left."""
    folder = tmp_path_factory.mktemp("pixels")
    for number in range(6):
        across, down = np.meshgrid(np.arange(28), np.arange(20))
        alpha = np.where((across < 14) & (number % 2 == 0), 0, 255)
        pixels = np.stack([across, down, np.full_like(down, 200 + number), alpha], axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def reader_of(folder, variety, seed=0, side=16):
    plan = DataPlan(Buckets(((side, side),)), 4, 1.0, 4, {})
    return PixelReader(Inventory(read_folder(folder, Columns(caption="")), plan), seed, 3, variety)


def test_draws_know_nothing_of_the_batch(folder):
    reader = reader_of(folder, EVERYTHING)
    members = [(0, 3, 0), (0, 1, 0), (2, 3, 0), (2, 3, 1)]
    together = reader[members, 0]
    assert together.pixels.shape == (4, 3, 16, 16) and together.pixels.dtype == torch.uint8 and together.noise.shape == (4, 3, 4, 4)
    assert together.ids == ["3.png", "1.png", "3.png", "3.png"]
    for row, member in enumerate(members):
        alone = reader[[member], 0]
        assert torch.equal(alone.pixels[0], together.pixels[row]) and torch.equal(alone.noise[0], together.noise[row])
    draws = {batch.pixels.numpy().tobytes() for batch in (reader[[(epoch, 3, 0)], 0] for epoch in range(8))}
    assert len(draws) > 6  # another epoch, other draws
    assert not torch.equal(reader_of(folder, EVERYTHING, seed=1)[members, 0].pixels, together.pixels)


def test_a_crop_is_of_the_pictures_own_pixels_anywhere(folder):
    reader = reader_of(folder, Variety(random_crop=True))
    corners = set()
    for epoch in range(200):
        pixels = reader[[(epoch, 1, 0)], 0].pixels[0]
        left, top = pixels[0, 0, 0].item(), pixels[1, 0, 0].item()
        assert torch.equal(pixels[0], (left + torch.arange(16)).expand(16, 16).byte()), "scaled, or turned"
        assert torch.equal(pixels[1], (top + torch.arange(16))[:, None].expand(16, 16).byte())
        corners.add((left, top))
    assert {left for left, _ in corners} == set(range(13)) and {top for _, top in corners} == set(range(5))


def test_without_variety_it_is_what_the_training_of_a_network_sees(folder):
    reader = reader_of(folder, EVERYTHING).plain()
    for number in range(6):
        wanted = load(folder / f"{number}.png", Transform(16, 16))
        assert np.array_equal(reader[[(0, number, 0)], 0].pixels[0].permute(1, 2, 0).numpy(), wanted)


def test_a_background_shows_where_it_is_transparent_alone(folder):
    reader = reader_of(folder, Variety(random_crop=True, random_background=1.0), side=20)
    seen = set()
    for epoch in range(20):
        left = reader[[(epoch, 0, 0)], 0].pixels[0, :, :, :6]  # of 28 pixels the crop begins at 8 at most: 6 are transparent in any
        assert (left == left[:, :1, :1]).all()
        seen.add(tuple(left[:, 0, 0].tolist()))
        solid = reader[[(epoch, 1, 0)], 0].pixels[0]
        assert (solid[2] == 201).all()
    assert len(seen) == 20
    white = reader_of(folder, Variety(random_crop=True), side=20)[[(0, 0, 0)], 0].pixels[0, :, :, :6]
    assert (white == 255).all()


def test_colours_change_places_in_all_orders(folder):
    reader, plain = (reader_of(folder, Variety(permute_colours=share)) for share in (1.0, 0.0))
    wanted, found = plain[[(0, 1, 0)], 0].pixels[0], set()
    for epoch in range(60):
        pixels = reader[[(epoch, 1, 0)], 0].pixels[0]
        order = tuple(next(c for c in range(3) if torch.equal(pixels[place], wanted[c])) for place in range(3))
        found.add(order)
    assert len(found) == 6


def test_a_small_picture_is_scaled_to_cover():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8))
    assert crop(image, Transform(16, 16), 0.999, 0.999).shape == (16, 16, 3)
    assert np.array_equal(crop(image, Transform(8, 4), 0.999, 0.0), np.array(image)[:, 6:])


def test_a_picture_that_changed_is_told(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    reader = reader_of(tmp_path, Variety())
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    with pytest.raises(InputError, match="changed"):
        reader[[(0, 0, 0)], 0]


def test_batches_are_of_one_bucket():
    assert batches_of([0, 1, 2, 5, 4], np.array([1, 0, 1, 0, 1, 0]), 2) == [[1, 5], [0, 2], [4]]
