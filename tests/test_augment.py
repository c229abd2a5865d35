"""Crops and flips, seen in images whose pixels say where they come from; normalisation by torchvision."""

import pytest
import torch
from torchvision.transforms.v2 import functional as torchvision

from deepknn_lib.augment import center_crop, crop_size, normalize, random_crop_flip


def telltale(count, height, width):
    """The channels hold a pixel's row, its column and the number of its image."""
    places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack([*places, torch.zeros(height, width)]).repeat(count, 1, 1, 1)
    images[:, 2] = (torch.arange(count) % 256)[:, None, None]
    return images.byte()


def test_crops_are_windows_of_their_own_image_in_every_place_and_half_are_flipped():
    images, span = telltale(3000, 9, 12), torch.arange(5)
    crops, again, other = (random_crop_flip(images, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(crops, again) and not torch.equal(crops, other) and crops.dtype == torch.uint8
    top, first, last = crops[:, 0, 0, 0].long(), crops[:, 1, 0, 0].long(), crops[:, 1, 0, -1].long()
    flip, left = first > last, torch.minimum(first, last)
    rows, columns = top[:, None] + span, left[:, None] + torch.where(flip[:, None], span.flip(0), span)
    numbers = (torch.arange(3000) % 256)[:, None, None].expand(-1, 5, 5)
    expected = rows[:, :, None].expand(-1, -1, 5), columns[:, None].expand(-1, 5, -1), numbers
    assert torch.equal(crops.long(), torch.stack(expected, 1)) and torch.equal(images, telltale(3000, 9, 12))
    for place, count in ((top, 5), (left, 8), (flip.long(), 2)):  # Every place comes about equally often.
        share = place.bincount(minlength=count) / 3000
        assert len(share) == count and (share - 1 / count).abs().max() < 0.04
    correlated = torch.corrcoef(torch.stack([top, left, flip]).float()) - torch.eye(3)
    assert correlated.abs().max() < 0.08  # The three are drawn apart.


@pytest.mark.parametrize("size, crop, start", [(8, 4, 2), (8, 8, 0), (9, 5, 2), (8, 5, 1), (256, 224, 16)])
def test_center_crop_takes_the_middle_and_the_crop_is_the_papers_in_proportion(size, crop, start):
    images = telltale(2, size, size)
    assert torch.equal(center_crop(images, crop), images[:, :, start : start + crop, start : start + crop])
    assert [crop_size(side) for side in (256, 64, 48, 32)] == [224, 56, 42, 28]


def test_images_smaller_than_the_crop_are_refused():
    with pytest.raises(ValueError, match="7×7 from images of 6×8"):
        center_crop(telltale(2, 6, 8), 7)
    with pytest.raises(ValueError, match="7×7 from images of 8×6"):
        random_crop_flip(telltale(2, 8, 6), 7, torch.Generator())


def test_normalize_is_torchvisions_and_grey_becomes_three_channels():
    mean, std, images = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), telltale(3, 8, 8)
    theirs = torchvision.normalize(torchvision.to_dtype(images, torch.float32, scale=True), mean, std)
    statistics = torch.tensor(mean), torch.tensor(std)
    torch.testing.assert_close(normalize(images, *statistics), theirs)
    grey = images[:, :1]
    assert torch.equal(normalize(grey, *statistics), normalize(grey.expand(3, 3, 8, 8), *statistics))
