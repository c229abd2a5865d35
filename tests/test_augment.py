"""Crops and flips, seen in images whose pixels say where they come from; normalisation by torchvision."""

import torch
from torchvision.transforms.v2 import functional as torchvision

from deepknn_lib.augment import crop_size, normalize, random_crop_flip


def telltale(count, height, width):
    """The channels hold a pixel's row, its column and the number of its image."""
    number, row, column = torch.meshgrid(*map(torch.arange, (count, height, width)), indexing="ij")
    return torch.stack([row, column, number % 256], 1).byte()


def test_crops_are_windows_of_their_own_image_in_every_place_and_half_are_flipped():
    images = telltale(3000, 9, 12)
    crops, again, other = (random_crop_flip(images, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(crops, again) and not torch.equal(crops, other)
    top, first, last = crops[:, 0, 0, 0].long(), crops[:, 1, 0, 0].long(), crops[:, 1, 0, -1].long()
    flip, left = first > last, torch.minimum(first, last)
    for image, crop, y, x, turned in zip(images, crops, top, left, flip, strict=True):
        window = image[:, y : y + 5, x : x + 5]
        assert torch.equal(crop, window.flip(2) if turned else window)
    for place, count in ((top, 5), (left, 8), (flip.long(), 2)):  # Every place comes about equally often.
        share = place.bincount(minlength=count) / 3000
        assert len(share) == count and (share - 1 / count).abs().max() < 0.04
    correlated = torch.corrcoef(torch.stack([top, left, flip]).float()) - torch.eye(3)
    assert correlated.abs().max() < 0.08  # The three are drawn apart.
    assert crop_size(256) == 224


def test_normalize_is_torchvisions_and_grey_becomes_three_channels():
    statistics, images = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]), telltale(3, 8, 8)
    scaled = torchvision.to_dtype(images, torch.float32, scale=True)
    theirs = torchvision.normalize(scaled, *statistics.tolist())
    torch.testing.assert_close(normalize(images, *statistics), theirs)
    grey = images[:, :1]
    assert torch.equal(normalize(grey, *statistics), normalize(grey.expand(3, 3, 8, 8), *statistics))
