"""Crops and flips, seen in images whose pixels say where they come from; normalisation by hand."""

import pytest
import torch
from torchvision.transforms.v2 import functional as torchvision

from deepknn_lib.augment import center_crop, crop_size, normalize, random_crop_flip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def telltale(count, height, width):
    """The channels hold a pixel's row, its column and the number of its image."""
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    images[:, 0] = torch.arange(height, dtype=torch.uint8)[:, None]
    images[:, 1] = torch.arange(width, dtype=torch.uint8)
    images[:, 2] = (torch.arange(count) % 256).to(torch.uint8)[:, None, None]
    return images


def read(crops):
    """Top, left and flip of each crop of telltale images, after a look at every pixel."""
    count, _, side, _ = crops.shape
    values, span = crops.long(), torch.arange(side)
    top, first, last = values[:, 0, 0, 0], values[:, 1, 0, 0], values[:, 1, 0, -1]
    flip, left = first > last, torch.minimum(first, last)
    columns = left[:, None] + torch.where(flip[:, None], span.flip(0), span)
    assert torch.equal(values[:, 0], (top[:, None] + span)[:, :, None].expand(-1, -1, side))
    assert torch.equal(values[:, 1], columns[:, None].expand(-1, side, -1))
    assert torch.equal(values[:, 2], (torch.arange(count) % 256)[:, None, None].expand(-1, side, side))
    return top, left, flip


def test_crops_are_windows_of_their_own_image_in_every_place_and_half_are_flipped():
    images = telltale(3000, 9, 12)
    top, left, flip = read(random_crop_flip(images, 5, generator()))
    for place, count in ((top, 5), (left, 8)):  # Every place comes about equally often, borders too.
        share = place.bincount(minlength=count) / 3000
        assert len(share) == count and (share - 1 / count).abs().max() < 0.04
    assert 0.45 < flip.float().mean() < 0.55
    correlated = torch.corrcoef(torch.stack([top, left, flip]).float()) - torch.eye(3)
    assert correlated.abs().max() < 0.08  # The three are drawn apart.
    assert torch.equal(images, telltale(3000, 9, 12))  # The images are left alone.


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_uint8_are_kept_and_the_seed_decides(channels):
    images = torch.randint(256, (30, channels, 10, 10), dtype=torch.uint8, generator=generator())
    state = torch.get_rng_state()
    first, again, other = (random_crop_flip(images, 7, generator(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8 and first.shape == (30, channels, 7, 7)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size, crop, start", [(8, 4, 2), (8, 8, 0), (9, 5, 2), (256, 224, 16), (8, 5, 1)])
def test_center_crop_takes_the_middle(size, crop, start):
    images = telltale(2, size, size)
    assert torch.equal(center_crop(images, crop), images[:, :, start : start + crop, start : start + crop])


@pytest.mark.parametrize("height, width", [(6, 8), (8, 6)])
def test_images_smaller_than_the_crop_are_refused(height, width):
    for crop in (
        lambda images: random_crop_flip(images, 7, generator()),
        lambda images: center_crop(images, 7),
    ):
        with pytest.raises(ValueError, match=f"7×7 from images of {height}×{width}"):
            crop(telltale(2, height, width))


@pytest.mark.parametrize("image_size, crop", [(256, 224), (48, 42), (64, 56), (32, 28)])
def test_crop_size_is_the_papers_in_proportion(image_size, crop):
    assert crop_size(image_size) == crop


@pytest.mark.parametrize(
    "mean, std", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)]
)
def test_normalize_is_torchvisions_and_grey_becomes_three_channels(mean, std):
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator())
    theirs = torchvision.normalize(torchvision.to_dtype(images, torch.float32, scale=True), mean, std)
    statistics, before = (torch.tensor(mean), torch.tensor(std)), images.clone()
    torch.testing.assert_close(normalize(images, *statistics), theirs)
    assert torch.equal(images, before)
    grey = images[:, :1]
    assert torch.equal(normalize(grey, *statistics), normalize(grey.expand(3, 3, 8, 8), *statistics))
