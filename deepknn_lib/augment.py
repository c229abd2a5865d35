"""Random crop and flip, each image its own, on a whole uint8 batch where it lies; and the centre crop for testing."""

import torch
from torch import Tensor


def crop_size(image_size: int) -> int:
    """Side of the crop, in pixels: the paper's 224 of 256, in proportion."""
    return image_size * 7 // 8


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Float32 (B, 3, H, W) of uint8 (B, 1 or 3, H, W), with mean and std (3,) of values in 0..1; or ValueError."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, 0 to 255, got {images.dtype}")
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last).float()
    return images.sub_(mean.view(3, 1, 1) * 255).div_(std.view(3, 1, 1) * 255)


def random_crop_flip(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """A random square crop and a random horizontal flip of each image: uint8 (B, C, crop, crop).

    `images` are uint8 (B, C, H, W), on any device; `crop` is in pixels, ValueError if it is larger than H or W. The
    generator is on the CPU, so that a seed draws the same crops whatever the device.
    """
    _check_crop(images, crop)
    n, _, height, width = images.shape
    top = torch.randint(height - crop + 1, (n, 1), generator=generator)
    left = torch.randint(width - crop + 1, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    tiles = []
    for image, (y, x, turned) in zip(images, torch.cat([top, left, flip], 1).tolist(), strict=True):
        tile = image[:, y : y + crop, x : x + crop]
        tiles.append(tile.flip(2) if turned else tile)
    return torch.stack(tiles)


def center_crop(images: Tensor, crop: int) -> Tensor:
    """The central `crop`×`crop` pixels of images (B, C, H, W); ValueError if they are smaller than the crop."""
    _check_crop(images, crop)
    top, left = (images.shape[2] - crop) // 2, (images.shape[3] - crop) // 2
    return images[:, :, top : top + crop, left : left + crop]


def _check_crop(images: Tensor, crop: int) -> None:
    height, width = images.shape[2:]
    if crop > height or crop > width:
        raise ValueError(f"cannot crop {crop}×{crop} from images of {height}×{width}; use larger images")
