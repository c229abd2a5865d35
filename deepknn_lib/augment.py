"""Random crop and flip, each image its own, on a whole uint8 batch where it lies; and the centre crop for testing."""

import torch
from torch import Tensor

# The paper does not say how pixels are normalised; these are ImageNet's, which its pretrained weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def crop_size(image_size: int) -> int:
    """Side of the crop, in pixels: the paper's 224 of 256, in proportion."""
    return image_size * 7 // 8


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W), C = 1 or 3, to float32 (B, 3, H, W) with ImageNet's mean and standard deviation."""
    mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] * 255 for v in (MEAN, STD))
    if images.shape[1] == 1:
        return (images.float() - mean) / std  # one grey channel broadcasts to three
    # laid out for the convolutions while they are bytes, and then changed in place: a pass over memory is the cost here
    return images.contiguous(memory_format=torch.channels_last).float().sub_(mean).div_(std)


def _check_crop(images: Tensor, crop: int) -> None:
    height, width = images.shape[2:]
    if crop > height or crop > width:
        raise ValueError(f"cannot crop {crop}×{crop} from images of {height}×{width}; use a larger image size")


def random_crop_flip(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """A random square crop and a random horizontal flip of each image.

    Parameters
    ----------
    images : Tensor, uint8, (B, C, H, W)
        On any device; the crops are made there.
    crop : int
        Side of the crop in pixels, at most H and W.
    generator : torch.Generator
        On the CPU, so that a seed draws the same crops whatever the device.

    Returns
    -------
    Tensor, uint8, (B, C, crop, crop)

    Raises
    ------
    ValueError
        If the images are smaller than the crop.
    """
    _check_crop(images, crop)
    n, _, height, width = images.shape
    top = torch.randint(height - crop + 1, (n, 1), generator=generator)
    left = torch.randint(width - crop + 1, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    return (_copied if images.device.type == "cpu" else _gathered)(images, crop, top, left, flip)


def _copied(images: Tensor, crop: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Tile by tile: on a CPU several times faster than gathering pixels."""
    out = images.new_empty(*images.shape[:2], crop, crop)
    for image, tile, y, x, turned in zip(images, out, top.tolist(), left.tolist(), flip.tolist(), strict=True):
        cut = image[:, y[0] : y[0] + crop, x[0] : x[0] + crop]
        tile.copy_(cut.flip(2) if turned[0] else cut)
    return out


def _gathered(images: Tensor, crop: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """All pixels at once: on a GPU, where a call an image would cost more than the copying."""
    n, channels = images.shape[:2]
    span = torch.arange(crop)
    rows = (top + span).to(images.device)
    columns = (left + torch.where(flip, crop - 1 - span, span)).to(images.device)
    index = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return images[index, channel, rows[:, None, :, None], columns[:, None, None, :]]


def center_crop(images: Tensor, crop: int) -> Tensor:
    """The central `crop`×`crop` pixels of images (B, C, H, W); ValueError if they are smaller than the crop."""
    _check_crop(images, crop)
    top, left = (images.shape[2] - crop) // 2, (images.shape[3] - crop) // 2
    return images[:, :, top : top + crop, left : left + crop]
