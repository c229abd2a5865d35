"""Checks of the exercises of notebook 08 (backbones)."""

import torch
from exercises.compare import compare

from deepknn_lib.losses import deep_knn_loss
from deepknn_lib.models import build_network
from deepknn_lib.study.experiments import execute_all
from deepknn_lib.study.runs import PROFILES, make_run


def check_parameters(count, session) -> bool:
    """Exercise 1: the number of parameters of the smallest of the profile's four backbones."""
    networks = map(build_network, PROFILES[session.profile]["backbones"])
    return compare(count, min(sum(p.numel() for p in n.parameters()) for n in networks), 0)


def check_gap(name, points, session) -> bool:
    """Exercise 2: the backbone with the largest training accuracy minus test Acc, and that gap in points.

    Deep kNN, first seed, split by lesion, K_p = 5.
    """
    names, seed = PROFILES[session.profile]["backbones"], session.seeds[0]
    about = {"profile": session.profile, "split": "grouped", "seed": seed}
    runs = [make_run(session.dataset, "deep-knn", backbone=backbone, **about) for backbone in names]
    gaps = {}
    for result in execute_all(runs, session.device):
        acc = 100 * (result.predict(5) == result.arrays["test_labels"]).mean()
        gaps[result.run.backbone] = result.history[-1]["train_acc"] - acc
    largest = max(gaps, key=gaps.get)
    print("the backbone: ", end="")
    right = compare(name, largest)
    print("the gap: ", end="")
    return compare(points, gaps[largest], 0.01) and right


def check_backbone(make) -> bool:
    """Exercise 3: `make()` is a module from images (B, 3, H, W) of any size to features (B, D), trainable."""
    torch.manual_seed(0)
    network, labels = make(), torch.arange(3).repeat(8)
    said = ""
    if not isinstance(network, torch.nn.Module):
        said = f"my_backbone() returns a {type(network).__name__}, not a Module"
    elif not any(isinstance(part, torch.nn.Conv2d) for part in network.modules()):
        said = "there is no Conv2d in it"
    for size in (32, 48) if not said else ():
        images = torch.rand(len(labels), 3, size, size)
        images += labels[:, None, None, None] * torch.tensor([1.0, -1.0, 0.5])[:, None, None]
        try:
            features = network(images)
        except RuntimeError as error:
            said = f"images of {size} pixels do not fit: {str(error).splitlines()[0]}"
            break
        if features.ndim != 2 or len(features) != len(labels):
            said = f"features have the shape {tuple(features.shape)}; wanted is ({len(labels)}, D)"
            break
    if not said:
        deep_knn_loss(features, labels, k=3, m=3, margin=5.0).backward()
        still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        said = f"no gradient reaches {', '.join(still)}" if still else ""
    print(f"not yet: {said}" if said else "right")
    return not said
