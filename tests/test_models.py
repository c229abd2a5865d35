"""Backbones: the shapes they map, that they can be trained, and where their weights come from."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from deepknn_lib.models import PAPER_BACKBONES, SMALL_BACKBONES, build_network

FEATURES = {"small-vgg": 128, "small-resnet": 128, "small-densenet": 96, "small-seresnet": 128}


def images(size, count=4):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


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
    assert gradients[next(iter(gradients))].abs().sum() > 0  # it reaches the first layer


def test_each_small_backbone_has_what_its_relative_is_known_for():
    layers = {name: [type(m).__name__ for m in build_network(name).backbone.modules()] for name in SMALL_BACKBONES}
    assert "SEModule" in layers["small-seresnet"] and "SEModule" not in layers["small-resnet"]
    assert "BasicBlock" in layers["small-resnet"] and "DenseBlock" in layers["small-densenet"]
    assert set(layers["small-vgg"]) == {
        "Sequential", "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten",
    }  # fmt: skip


def test_the_last_pooling_of_the_small_densenet_leaves_a_pixel_and_else_is_plain():
    pool = build_network("small-densenet").backbone.features.transition3.pool
    maps = images(2)
    assert torch.equal(pool(maps), torch.nn.functional.avg_pool2d(maps, 2))  # what images of 48 pixels come to
    assert torch.equal(pool(images(1)), images(1))  # and of 32


@pytest.mark.parametrize("name", [*SMALL_BACKBONES, "mlp"])
def test_weights_come_from_the_seed_and_leave_the_generator_alone(name):
    state = torch.get_rng_state()
    first, again, other = (build_network(name, n_inputs=9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_four_of_the_paper_are_known_to_timm():
    assert len(PAPER_BACKBONES) == len(SMALL_BACKBONES) == 4 and all(map(timm.is_model, PAPER_BACKBONES))


def test_an_mlp_has_three_layers_and_must_be_told_how_long_vectors_are():
    network = build_network("mlp", n_inputs=11, normalize="batch-l2")
    assert network(torch.randn(5, 11)).shape == (5, 128)
    linear = [(m.in_features, m.out_features) for m in network.backbone if isinstance(m, torch.nn.Linear)]
    assert linear == [(11, 512), (512, 256), (256, 128)]
    with pytest.raises(ValueError, match="n_inputs must say how long"):
        build_network("mlp")


def test_what_is_unknown_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="unknown backbone 'resnet5000'; use small-vgg, small-resnet, .*resnet50"):
        build_network("resnet5000")
    with pytest.raises(ValueError, match="unknown normalize 'l1'"):
        build_network("small-vgg", normalize="l1")


# Weights


def unreachable(*_, **options):
    """`timm.create_model` on a machine that is not connected."""
    if options.get("pretrained"):
        raise OSError("no route to host")
    return create_model(*_, **options)


create_model = timm.create_model


def stored(folder, file_name, name="resnet18"):
    """A file of weights as a hub keeps them, with a classifier; and the model they are of."""
    source = create_model(name, num_classes=11)
    save_file(source.state_dict(), folder / file_name)
    return source


def test_a_tag_reads_its_own_file(monkeypatch, tmp_path):
    plain, pqf = stored(tmp_path, "resnet18.safetensors"), stored(tmp_path, "resnet18.pqf.safetensors")
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", unreachable)
    for weights, source in (("imagenet", plain), ("pqf", pqf), (str(tmp_path / "resnet18.pqf.safetensors"), pqf)):
        loaded = build_network("resnet18", weights=weights).backbone.state_dict()
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.items())
    assert not torch.equal(plain.conv1.weight, pqf.conv1.weight)


@pytest.mark.parametrize("folder", [True, False])
def test_a_tag_that_is_not_to_be_had_says_both_ways(monkeypatch, tmp_path, folder):
    if folder:
        monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))  # and no such file in it
    monkeypatch.setattr(timm, "create_model", unreachable)
    said = "no 'pqf' weights for 'resnet18'.*no route to host.*connect to the internet.*DEEPKNN_WEIGHTS.*resnet18.pqf.safet"
    with pytest.raises(FileNotFoundError, match=said):
        build_network("resnet18", weights="pqf")


def test_imagenet_that_is_not_to_be_had_says_both_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(FileNotFoundError, match="connect to the internet.*a folder holding resnet18.safetensors"):
        build_network("resnet18", weights="imagenet")
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no weights at .*resnet18.safetensors.*or unset DEEPKNN_WEIGHTS"):
        build_network("resnet18", weights="imagenet")


@pytest.mark.parametrize("kernel, said", [(7, "missing .*unexpected .'own.weight'"), (5, "[^:]*:\\s*size mismatch for con")])
def test_weights_of_another_network_are_refused(monkeypatch, tmp_path, kernel, said):
    other = {"conv1.weight": torch.zeros(64, 3, kernel, kernel), "own.weight": torch.zeros(2)}
    save_file(other, tmp_path / "resnet18.pqf.safetensors")
    monkeypatch.setenv("DEEPKNN_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match=f"pqf.safetensors does not fit resnet18: {said}"):
        build_network("resnet18", weights="pqf")


@pytest.mark.parametrize("name, weights, asked", [
    ("resnet50", "imagenet", "resnet50.tv_in1k"),
    ("vgg19", "imagenet", "vgg19.tv_in1k"),
    ("densenet121", "imagenet", "densenet121.tv_in1k"),
    ("legacy_seresnet50", "imagenet", "legacy_seresnet50"),  # timm has one training of it only
    ("resnet50", "a1_in1k", "resnet50.a1_in1k"),
])  # fmt: skip
def test_timm_is_asked_for_the_weights_of_the_papers_time(monkeypatch, name, weights, asked):
    names = []

    def recording(full_name, pretrained=False, **options):
        if pretrained:
            names.append(full_name)
            torch.manual_seed(12)
        return create_model("resnet10t", **options)  # small, in place of each

    monkeypatch.setattr(timm, "create_model", recording)
    network = build_network(name, weights=weights, seed=1)
    assert names == [asked]
    torch.manual_seed(12)
    expected = create_model("resnet10t", num_classes=0).state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in network.backbone.state_dict().items())


def test_the_tags_asked_for_are_known_to_timm():
    pretrained = timm.list_pretrained()
    assert {"resnet50.tv_in1k", "vgg19.tv_in1k", "densenet121.tv_in1k", "resnet18.tv_in1k"} <= set(pretrained)
    assert [name for name in pretrained if name.startswith("legacy_seresnet50.")] == ["legacy_seresnet50.in1k"]
