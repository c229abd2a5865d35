"""Backbones by name, with their weights and the preprocessing those weights were trained with; and their features."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from deepknn_lib.augment import center_crop, crop_size, normalize

SMALL = (
    "small-resnet"  # a ResNet-10 of quarter width that a CPU core trains in a minute or two; not a timm name
)
# Relatives of the paper's four backbones that a CPU can train, in the order of its Table 4; and the four themselves.
SMALL_BACKBONES = ("small-vgg", SMALL, "small-densenet", "small-seresnet")
PAPER_BACKBONES = ("vgg19", "resnet50", "densenet121", "legacy_seresnet50")
NORMALIZE = ("none", "l2", "batch-l2")

# The ImageNet weights of the paper's time; timm's default for some of these names is a later, stronger training.
_IMAGENET = dict.fromkeys(("vgg19", "resnet50", "resnet18", "densenet121"), "tv_in1k")


class Network(nn.Module):
    """A backbone that maps images to features, with a linear classifier on top when cross-entropy needs one.

    Parameters
    ----------
    backbone : nn.Module
        Maps float images (B, 3, H, W) to features (B, D).
    n_features : int
        D.
    n_classes : int, optional
        Adds the classifier.
    normalize : {"none", "l2", "batch-l2"}
        What is done to the features. `none`: nothing; a triplet loss can then be solved by shrinking them. `l2`:
        length 1, so that all distances lie in 0..2. `batch-l2`: batch normalisation without scale and shift, then
        length 1: every dimension keeps its spread in the batch, so that no loss can draw all images to one point.
    mean, std : tuple of float
        Of the pixels, in 0..1, that the backbone was trained with.
    """

    def __init__(
        self, backbone, n_features, n_classes=None, normalize="none", mean=(0.5,) * 3, std=(0.5,) * 3
    ):
        super().__init__()
        if normalize not in NORMALIZE:
            raise ValueError(f"unknown normalize {normalize!r}; choose one of {', '.join(NORMALIZE)}")
        self.backbone, self.n_features, self.normalize = backbone, n_features, normalize
        self.classifier = nn.Linear(n_features, n_classes) if n_classes else None
        self.spread = nn.BatchNorm1d(n_features, affine=False) if normalize == "batch-l2" else nn.Identity()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.mean.device

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (B, D) of normalised images (B, 3, H, W)."""
        features = self.spread(self.backbone(images).float())
        return features if self.normalize == "none" else nn.functional.normalize(features, dim=1)


def autocast(device: torch.device):
    """Bfloat16 on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def rows_of(inputs, index: Tensor, device: torch.device) -> Tensor:
    """Rows of a tensor, or of anything array-like that gives an ndarray for an index, on a device."""
    rows = (
        inputs[index.to(inputs.device)]
        if isinstance(inputs, Tensor)
        else torch.from_numpy(inputs[index.numpy()])
    )
    return rows.to(device, non_blocking=True)


@torch.no_grad()
def extract_features(network: Network, inputs, batch_size: int = 256) -> Tensor:
    """Features float32 (N, D) of uint8 images (N, C, H, W), from their central crop, or of float vectors (N, n)."""
    network.eval()
    parts = []
    for index in torch.arange(len(inputs)).split(batch_size):
        rows = rows_of(inputs, index, network.device)
        if rows.ndim == 4:
            rows = normalize(center_crop(rows, crop_size(rows.shape[-1])), network.mean, network.std)
        with autocast(network.device):
            parts.append(network(rows).float())
    return torch.cat(parts)


def preprocessing(name: str, weights: str = "none") -> dict:
    """`mean`, `std` and `interpolation` that a backbone's weights were trained with, as timm records them.

    ImageNet's mean and std and bilinear where timm knows nothing of it; a file or tag of one's own counts as the
    ImageNet weights of its backbone.
    """
    import timm

    names = [f"{name}.{tag}" for tag in (weights, _IMAGENET.get(name))] + [name]
    known = [*timm.list_pretrained(f"{name}.*"), *([name] if timm.is_model(name) else [])]
    found = next((timm.get_pretrained_cfg(one) for one in names if one in known), None)
    default = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}
    return {key: getattr(found, key) for key in default} if found else default


def build_network(
    name: str,
    *,
    weights: str = "none",
    n_classes: int | None = None,
    normalize: str = "none",
    seed: int = 0,
    n_inputs: int | None = None,
) -> Network:
    """A network on the backbone `name`.

    Parameters
    ----------
    name : str
        One of `SMALL_BACKBONES`, `mlp` (for feature vectors of length `n_inputs`), or any model of timm.
    weights : str
        `none`: initialised from `seed`. `imagenet`: `<name>.safetensors` from the folder `DEEPKNN_WEIGHTS` if it
        is set, else timm's pretrained weights, which timm downloads. Another word is a tag: the file
        `<name>.<tag>.safetensors` in that folder, else timm's weights of that tag (`a1_in1k`). What ends in
        `.safetensors` is a file.
    n_classes, normalize
        See `Network`.
    seed : int
        Of every weight that is not loaded.

    Raises
    ------
    ValueError
        If the backbone is unknown or the file does not fit it.
    FileNotFoundError
        If the weights are not to be had; the message says both ways to get them.
    """
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            if not n_inputs:
                raise ValueError(
                    "the backbone 'mlp' maps feature vectors; n_inputs must say how long they are"
                )
            backbone, n_features = _mlp(n_inputs), 128
        elif name in SMALL_BACKBONES:
            backbone, n_features = _small(name)
        elif timm.is_model(name):
            backbone = timm.create_model(name, num_classes=0)
            # timm's num_features can differ from what its pooled head puts out (VGG)
            n_features = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        else:
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
            own = ", ".join(SMALL_BACKBONES)
            raise ValueError(f"unknown backbone {name!r}; use {own} or a timm model name (close: {close})")
        pixels = preprocessing(name, weights)
        network = Network(backbone, n_features, n_classes, normalize, pixels["mean"], pixels["std"])
    if weights != "none":
        _load(backbone, name, weights)
    return network


def weights_file(name: str, weights: str) -> Path | None:
    """The file that `weights` stand for; None where timm has them or nothing is loaded."""
    folder = os.environ.get("DEEPKNN_WEIGHTS")
    if weights.endswith(".safetensors"):
        return Path(weights)
    path = Path(folder or "") / (
        f"{name}.safetensors" if weights == "imagenet" else f"{name}.{weights}.safetensors"
    )
    return path if weights != "none" and folder and (weights == "imagenet" or path.is_file()) else None


def _load(backbone: nn.Module, name: str, weights: str) -> None:
    path = weights_file(name, weights)
    if path is None:
        return backbone.load_state_dict(_from_timm(name, weights))
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}. Put {name}.safetensors (timm's or torchvision's key layout) there, or unset "
            "DEEPKNN_WEIGHTS and let timm download its own, or use weights='none'"
        )
    from safetensors.torch import load_file

    state = {
        key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()
    }
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:  # the same names with other shapes
        raise ValueError(f"{path} does not fit {name}: {error}") from error
    # a classifier is not wanted here, and counters of batches are not always stored
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [
        key for key in unexpected if not key.startswith(("fc.", "classifier.", "head.", "last_linear."))
    ]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit {name}: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _from_timm(name: str, weights: str) -> dict[str, Tensor]:
    """Pretrained weights as timm downloads them, or keeps them from an earlier download."""
    import timm

    tag = _IMAGENET.get(name, "") if weights == "imagenet" else weights
    try:
        return timm.create_model(
            f"{name}.{tag}" if tag else name, pretrained=True, num_classes=0
        ).state_dict()
    except Exception as error:  # the hub raises a different error for every way of being out of reach
        file_name = f"{name}.safetensors" if weights == "imagenet" else f"{name}.{weights}.safetensors"
        raise FileNotFoundError(
            f"no {weights!r} weights for {name!r}: timm could not download them ({type(error).__name__}: {error}). "
            f"Either connect to the internet, or set DEEPKNN_WEIGHTS to a folder holding {file_name}"
        ) from error


def _mlp(n_inputs: int) -> nn.Sequential:
    """The paper's "three-layer MLPs (with batch normalization and ReLU activation)"; the widths are our choice."""
    hidden = [
        layer
        for before, after in ((n_inputs, 512), (512, 256))
        for layer in (nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*hidden, nn.Linear(256, 128))


def _small(name: str) -> tuple[nn.Module, int]:
    """One of `SMALL_BACKBONES` and its D."""
    if name == "small-vgg":  # a stack of 3×3 convolutions without shortcuts, pooling in between
        layers, channels = [], 3
        for width, pool in ((16, True), (32, True), (64, False), (64, True), (128, False), (128, True)):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            layers += [
                nn.MaxPool2d(2)
            ] * pool  # before the normalisation, which is then a quarter of the work
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128
    if name == "small-densenet":
        from timm.models.densenet import DenseNet

        dense = DenseNet(growth_rate=16, block_config=(2, 2, 4, 3), num_classes=0)
        dense.features.transition3.pool = nn.AvgPool2d(
            2, ceil_mode=True
        )  # of 28 pixels a single one is left there
        return dense, dense.num_features
    from timm.models.resnet import BasicBlock, ResNet

    attention = {"block_args": {"attn_layer": "se"}} if name == "small-seresnet" else {}
    small = {"channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8}
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, **small, **attention), 128
