"""Backbones by name, and where their weights come from."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

SMALL = "small-resnet"  # a ResNet-10 of quarter width that a CPU core trains in a minute or two; not a timm name

NORMALIZE = ("none", "l2", "batch-l2")


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
    """

    def __init__(self, backbone: nn.Module, n_features: int, n_classes: int | None = None, normalize: str = "none"):
        super().__init__()
        if normalize not in NORMALIZE:
            raise ValueError(f"unknown normalize {normalize!r}; choose one of {', '.join(NORMALIZE)}")
        self.backbone = backbone
        self.classifier = nn.Linear(n_features, n_classes) if n_classes else None
        self.spread = nn.BatchNorm1d(n_features, affine=False) if normalize == "batch-l2" else nn.Identity()
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (B, D) of normalised images (B, 3, H, W)."""
        features = self.spread(self.backbone(images).float())
        return features if self.normalize == "none" else nn.functional.normalize(features, dim=1)


def build_network(
    name: str, *, weights: str = "none", n_classes: int | None = None, normalize: str = "none", seed: int = 0
) -> Network:
    """A network on the backbone `name`.

    Parameters
    ----------
    name : str
        `small-resnet`, or any model of timm (`resnet50`, `vgg19`, `densenet121`, `seresnet50`, …).
    weights : str
        `none`: initialised from `seed`. `imagenet`: `<name>.safetensors` from the folder `DEEPKNN_WEIGHTS` if it
        is set, else timm's pretrained weights, which timm downloads. Any other value is a safetensors file.
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
    from timm.models.resnet import BasicBlock, ResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == SMALL:
            backbone = ResNet(
                BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(16, 32, 64, 128), stem_type="deep", stem_width=8
            )
        elif timm.is_model(name):
            backbone = timm.create_model(name, num_classes=0)
        else:
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
            raise ValueError(f"unknown backbone {name!r}; use {SMALL!r} or a timm model name (close: {close})")
        # timm's num_features can differ from what its pooled head puts out (VGG)
        n_features = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        network = Network(backbone, n_features, n_classes, normalize)
    if weights != "none":
        _load(backbone, name, weights)
    return network


def _load(backbone: nn.Module, name: str, weights: str) -> None:
    from safetensors.torch import load_file

    folder = os.environ.get("DEEPKNN_WEIGHTS")
    if weights != "imagenet":
        path = Path(weights)
    elif folder:
        path = Path(folder) / f"{name}.safetensors"
    else:
        import timm

        try:
            state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # the hub raises a different error for every way of being out of reach
            raise FileNotFoundError(
                f"no ImageNet weights for {name!r}: timm could not download them ({type(error).__name__}: {error}). "
                f"Either connect to the internet, or set DEEPKNN_WEIGHTS to a folder holding {name}.safetensors"
            ) from error
        backbone.load_state_dict(state)
        return
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}. Put {name}.safetensors (timm's or torchvision's key layout) there, or unset "
            "DEEPKNN_WEIGHTS and let timm download its own, or use weights='none'"
        )
    state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    # a classifier is not wanted here, and counters of batches are not always stored
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in unexpected if not key.startswith(("fc.", "classifier.", "head."))]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit {name}: missing {missing[:3]}, unexpected {unexpected[:3]}")
