"""Crops and flips, seen in images whose pixels say where they come from; normalisation by hand."""

import pytest
import torch

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
    values = crops.long()
    top, first, last = values[:, 0, 0, 0], values[:, 1, 0, 0], values[:, 1, 0, -1]
    flip, left = first > last, torch.minimum(first, last)
    span = torch.arange(side)
    columns = left[:, None] + torch.where(flip[:, None], span.flip(0), span)
    assert torch.equal(values[:, 0], (top[:, None] + span)[:, :, None].expand(-1, -1, side))
    assert torch.equal(values[:, 1], columns[:, None].expand(-1, side, -1))
    assert torch.equal(values[:, 2], (torch.arange(count) % 256)[:, None, None].expand(-1, side, side))
    return top, left, flip


def test_crops_are_windows_of_their_own_image_in_every_place():
    images = telltale(3000, 9, 12)
    top, left, _ = read(random_crop_flip(images, 5, generator()))
    for place, count in ((top, 5), (left, 8)):  # every place, borders too, about equally often
        share = place.bincount(minlength=count) / 3000
        assert len(share) == count and (share - 1 / count).abs().max() < 0.04
    assert torch.equal(images, telltale(3000, 9, 12))  # the images are left alone


def test_about_half_are_flipped_and_flips_do_not_depend_on_the_place():
    top, left, flip = read(random_crop_flip(telltale(3000, 9, 12), 5, generator()))
    assert 0.45 < flip.float().mean() < 0.55
    for place in (top, left):
        assert abs(torch.corrcoef(torch.stack([place, flip]).float())[0, 1]) < 0.08


def test_top_and_left_are_drawn_apart():
    top, left, _ = read(random_crop_flip(telltale(3000, 12, 12), 5, generator()))
    assert abs(torch.corrcoef(torch.stack([top, left]).float())[0, 1]) < 0.08


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_uint8_are_kept(channels):
    images = torch.randint(256, (4, channels, 10, 10), dtype=torch.uint8, generator=generator())
    crops = random_crop_flip(images, 7, generator())
    assert crops.dtype == torch.uint8 and crops.shape == (4, channels, 7, 7)


def test_the_seed_decides():
    images = telltale(50, 20, 20)
    state = torch.get_rng_state()
    first, again, other = (random_crop_flip(images, 10, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_crop_of_the_whole_image_is_the_image_or_its_mirror():
    images = telltale(40, 6, 6)
    _, _, flip = read(random_crop_flip(images, 6, generator()))
    assert flip.any() and not flip.all()


@pytest.mark.parametrize("size, crop, start", [(8, 4, 2), (8, 8, 0), (9, 5, 2), (256, 224, 16), (8, 5, 1)])
def test_center_crop_takes_the_middle(size, crop, start):
    images = telltale(2, size, size)
    expected = images[:, :, start : start + crop, start : start + crop]
    assert torch.equal(center_crop(images, crop), expected) and expected.shape[2:] == (crop, crop)


def test_center_crop_of_an_oblong_image():
    top, left, flip = read(center_crop(telltale(2, 6, 10), 4))
    assert top.tolist() == [1, 1] and left.tolist() == [3, 3] and not flip.any()


@pytest.mark.parametrize("height, width", [(6, 8), (8, 6)])
def test_images_smaller_than_the_crop_are_refused(height, width):
    images = telltale(2, height, width)
    with pytest.raises(ValueError, match=f"7×7 from images of {height}×{width}"):
        random_crop_flip(images, 7, generator())
    with pytest.raises(ValueError, match=f"7×7 from images of {height}×{width}"):
        center_crop(images, 7)


@pytest.mark.parametrize("image_size, crop", [(256, 224), (48, 42), (64, 56), (32, 28)])
def test_crop_size_is_the_papers_in_proportion(image_size, crop):
    assert crop_size(image_size) == crop


def test_normalize_by_hand():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 4, 5)
    found = normalize(pixels)
    expected = torch.tensor([-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    assert found.shape == (2, 3, 4, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected[None, :, None, None].expand(2, 3, 4, 5))


def test_normalize_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator())
    floats = transforms.to_dtype(images, torch.float32, scale=True)
    theirs = transforms.normalize(floats, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(images), theirs)


def test_normalize_makes_three_channels_of_grey():
    grey = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=generator())
    assert torch.equal(normalize(grey), normalize(grey.expand(3, 3, 8, 8)))


@pytest.mark.parametrize("channels", [1, 3])
def test_copied_tiles_are_the_gathered_pixels(channels):
    from deepknn_lib import augment

    images = torch.randint(0, 256, (12, channels, 20, 24), dtype=torch.uint8)
    top, left = torch.randint(5, (12, 1)), torch.randint(9, (12, 1))
    flip = torch.arange(12)[:, None] % 2 == 0
    tiles = augment._copied(images, 16, top, left, flip)
    assert torch.equal(tiles, augment._gathered(images, 16, top, left, flip))
    assert torch.equal(tiles[1], images[1, :, top[1] : top[1] + 16, left[1] : left[1] + 16])
