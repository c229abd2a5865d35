"""Backbones: what they map, that they can be trained, where their weights come from, and the pixels they get."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from deepknn_lib.models import (
    PAPER_BACKBONES,
    SMALL_BACKBONES,
    Network,
    build_network,
    extract_features,
    preprocessing,
)

FEATURES = {"small-vgg": 128, "small-resnet": 128, "small-densenet": 96, "small-seresnet": 128}
create_model = timm.create_model


def images(size, count=4):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def parameters(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", SMALL_BACKBONES)
@pytest.mark.parametrize("size", [42, 28])  # the crops of images of 48 and 32 pixels
def test_small_backbones_map_images_to_features_and_learn(name, size):
    network = build_network(name, n_classes=7, normalize="l2")
    features = network(images(size))
    assert features.shape == (4, FEATURES[name]) and features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.nn.functional.cross_entropy(network.classifier(features), torch.arange(4)).backward()
    gradients = {n: p.grad for n, p in network.named_parameters()}
    assert not [n for n, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    assert gradients[next(iter(gradients))].abs().sum() > 0  # The gradient reaches the first layer.


def test_each_small_backbone_has_what_its_relative_is_known_for():
    layers = {name: {type(m).__name__ for m in build_network(name).modules()} for name in SMALL_BACKBONES}
    assert "SEModule" in layers["small-seresnet"] and "SEModule" not in layers["small-resnet"]
    assert "BasicBlock" in layers["small-resnet"] and "DenseBlock" in layers["small-densenet"]
    assert not layers["small-vgg"] & {"SEModule", "BasicBlock", "DenseBlock"}
    assert len(PAPER_BACKBONES) == 4 and all(map(timm.is_model, PAPER_BACKBONES))


@pytest.mark.parametrize("name", [*SMALL_BACKBONES, "mlp"])
def test_weights_come_from_the_seed_and_leave_the_generator_alone(name):
    state = torch.get_rng_state()
    first, again, other = (parameters(build_network(name, n_inputs=9, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_mlp_has_three_layers():
    network = build_network("mlp", n_inputs=11, normalize="batch-l2")
    assert network(torch.randn(5, 11)).shape == (5, 128)
    linear = [(m.in_features, m.out_features) for m in network.backbone if isinstance(m, torch.nn.Linear)]
    assert linear == [(11, 512), (512, 256), (256, 128)]


def test_batch_l2_features_cannot_shrink_to_a_point():
    tiny = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 8))
    distances = []
    for normalize in ("none", "batch-l2"):
        network = Network(tiny, 8, normalize=normalize).train()
        distances.append(torch.pdist(network(1e-6 * images(8, count=20))).mean().item())
    assert distances[0] < 1e-5 and distances[1] > 0.1


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("resnet5000", {}, "unknown backbone 'resnet5000'; use small-vgg, small-resnet, .*resnet50"),
        ("small-vgg", {"normalize": "l1"}, "unknown normalize 'l1'"),
        ("mlp", {}, "n_inputs must say how long"),
    ],
)
def test_what_is_unknown_is_named_with_what_there_is(name, options, told):
    with pytest.raises(ValueError, match=told):
        build_network(name, **options)


# Pixels


@pytest.mark.parametrize(
    "name, tag, mean, std, interpolation",
    [
        ("resnet18", "tv_in1k", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"),
        ("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"),
    ],
)
def test_a_backbone_gets_the_pixels_its_weights_were_trained_with(name, tag, mean, std, interpolation):
    recorded = timm.get_pretrained_cfg(f"{name}.{tag}")
    assert (recorded.mean, recorded.std, recorded.interpolation) == (mean, std, interpolation)
    for weights in ("imagenet", tag, "some/file.safetensors"):
        assert preprocessing(name, weights) == {"mean": mean, "std": std, "interpolation": interpolation}
    network = build_network(name)
    assert network.mean.tolist() == pytest.approx(mean) and network.std.tolist() == pytest.approx(std)


def test_features_come_from_the_normalised_central_crop_in_evaluation_mode():
    network = Network(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), 3).train()
    network.mean, network.std = torch.tensor([0.5, 0.0, 1.0]), torch.tensor([0.5, 1.0, 2.0])
    pixels = torch.full((5, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[:, :, :2] = 0  # Rows 0 and 1 of 32 lie outside the central 28.
    found = extract_features(network, pixels, batch_size=2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0]]).expand(5, 3))
    torch.testing.assert_close(extract_features(network, pixels.numpy()), found)  # as from disk
    assert not network.training


# Weights


def unreachable(*args, **options):
    """`timm.create_model` on a machine that is not connected."""
    if options.get("pretrained"):
        raise OSError("no route to host")
    return create_model(*args, **options)


def stored(folder, file_name):
    """A file of weights as a hub keeps them, with a classifier; and the model they are of."""
    source = create_model("resnet10t", num_classes=11)
    save_file(source.state_dict(), folder / file_name)
    return source.state_dict()


def test_a_tag_reads_its_own_file(monkeypatch, tmp_path):
    plain, pqf = stored(tmp_path, "resnet10t.safetensors"), stored(tmp_path, "resnet10t.pqf.safetensors")
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", unreachable)
    files = {"imagenet": plain, "pqf": pqf, str(tmp_path / "resnet10t.pqf.safetensors"): pqf}
    for weights, source in files.items():
        loaded = build_network("resnet10t", weights=weights).backbone.state_dict()
        assert all(torch.equal(value, source[name]) for name, value in loaded.items())
    assert not torch.equal(plain["layer1.0.conv1.weight"], pqf["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    "folder, weights, told",
    [
        (False, "imagenet", "connect to the internet.*a folder holding resnet10t.safetensors"),
        (False, "pqf", "no 'pqf' weights.*no route to host.*DEEPKNN_WEIGHTS.*resnet10t.pqf.safetensors"),
        (True, "pqf", "connect to the internet.*a folder holding resnet10t.pqf.safetensors"),
        (True, "imagenet", "no weights at .*resnet10t.safetensors.*or unset DEEPKNN_WEIGHTS"),
    ],
)
def test_weights_that_are_not_to_be_had_say_both_ways(monkeypatch, tmp_path, folder, weights, told):
    if folder:
        monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(FileNotFoundError, match=told):
        build_network("resnet10t", weights=weights)


@pytest.mark.parametrize(
    "kernel, told", [(3, "missing .*unexpected .'own.weight'"), (5, "[^:]*:\\s*size mismatch")]
)
def test_weights_of_another_network_are_refused(tmp_path, kernel, told):
    other = {"layer1.0.conv1.weight": torch.zeros(64, 64, kernel, kernel), "own.weight": torch.zeros(2)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"other.safetensors does not fit resnet10t: {told}"):
        build_network("resnet10t", weights=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    "name, weights, asked",
    [
        ("resnet50", "imagenet", "resnet50.tv_in1k"),
        ("vgg19", "imagenet", "vgg19.tv_in1k"),
        ("densenet121", "imagenet", "densenet121.tv_in1k"),
        ("legacy_seresnet50", "imagenet", "legacy_seresnet50"),  # timm has one training of it only.
        ("resnet50", "a1_in1k", "resnet50.a1_in1k"),
    ],
)
def test_timm_is_asked_for_the_weights_of_the_papers_time(monkeypatch, name, weights, asked):
    names = []

    def recording(full_name, pretrained=False, **options):
        names.extend([full_name] if pretrained else [])
        return create_model("resnet10t", **options)  # a small network in place of each

    monkeypatch.setattr(timm, "create_model", recording)
    build_network(name, weights=weights)
    assert names == [asked] and (asked in timm.list_pretrained() or name == asked)
