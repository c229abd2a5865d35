"""The training loop: it learns, it repeats itself, it resumes, and it says when something is wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepknn_lib import training
from deepknn_lib.images import Rows
from deepknn_lib.losses import whole_set_terms
from deepknn_lib.models import Network, build_network
from deepknn_lib.neighbors import whole_set_neighbors
from deepknn_lib.training import Recipe, collapsed, extract_features, fit, leave_one_out_accuracy

RECIPE = Recipe(epochs=3, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=1)


def small(seed=0, loss="deep-knn", normalize="batch-l2"):
    return build_network("small-resnet", n_classes=3 if loss == "weighted-ce" else None, normalize=normalize, seed=seed)


def tensors(toy):
    return torch.from_numpy(toy[0]), torch.from_numpy(toy[1])


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize(
    "loss, changes",
    [("deep-knn", {}), ("deep-knn", {"search_every": 2}), ("triplet", {}), ("triplet", {"soft": True}), ("weighted-ce", {})],
)
def test_every_loss_learns_an_easy_set(toy, loss, changes):
    network = small(loss=loss, normalize="none" if loss == "weighted-ce" else "batch-l2")
    recipe = Recipe(loss=loss, epochs=6, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=3, **changes)
    history = fit(network, *tensors(toy), recipe)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["train_acc"] > 90
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in history] == [0.05] * 3 + [0.025] * 3
    assert math.isnan(history[0]["active"]) == (loss == "weighted-ce")
    assert all(row["spread"] > 0 and row["seconds"] > 0 for row in history)


def test_a_seed_gives_the_same_weights_twice_and_another_seed_others(toy):
    runs = []
    for seed in (0, 0, 1):
        network = small(seed=0)
        fit(network, *tensors(toy), Recipe(**(vars(RECIPE) | {"seed": seed})))
        runs.append(weights(network))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("changes", [{}, {"search_every": 2, "warmup": 2}], ids=["in the batch", "whole set, warm-up"])
def test_a_killed_run_resumes_and_ends_with_the_same_weights(toy, tmp_path, changes):
    recipe = replace(RECIPE, **changes)
    whole = small()
    history = fit(whole, *tensors(toy), recipe)

    class Killed(Exception):
        pass

    def kill(row):
        if row["epoch"] == 2:
            raise Killed

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        fit(small(), *tensors(toy), recipe, checkpoint=checkpoint, on_epoch=kill)
    assert checkpoint.is_file()
    resumed, seen = small(seed=5), []  # another start, to show that the state comes from the checkpoint
    again = fit(resumed, *tensors(toy), recipe, checkpoint=checkpoint, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [2, 3]  # epoch 1 was not trained again
    assert torch.equal(weights(whole), weights(resumed))
    assert [row["loss"] for row in again] == [row["loss"] for row in history]


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_warm_up_raises_the_learning_rate_step_by_step_to_that_of_the_recipe(toy, monkeypatch, warmup):
    used = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            used.extend(group["lr"] for group in self.param_groups)
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Recording)
    recipe = Recipe(epochs=4, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=3, warmup=warmup)
    history = fit(small(), *tensors(toy), recipe)
    steps = 3  # ceil(60 / 24)
    rising = [0.05 * min((step + 1) / (steps * max(warmup, 1)), 1) for step in range(3 * steps)] if warmup else [0.05] * 9
    assert used == pytest.approx(rising + [0.025] * steps)
    assert [row["lr"] for row in history] == used[steps - 1 :: steps]


@pytest.mark.parametrize("every, searches", [(0, 0), (1, 6), (2, 4), (99, 2)])
def test_the_whole_set_is_searched_as_often_as_asked(toy, monkeypatch, every, searches):
    calls = []

    def counting(features, labels, k, m):
        calls.append(len(features))
        return whole_set_neighbors(features, labels, k, m)

    monkeypatch.setattr(training, "whole_set_neighbors", counting)
    fit(small(), *tensors(toy), Recipe(epochs=2, batch_size=24, k=3, m=3, search_every=every))  # 3 steps an epoch
    assert calls == [60] * searches


def test_a_step_with_whole_set_search_takes_as_many_images_as_a_batch(toy, monkeypatch):
    shapes = []

    def looking(features, near, margin):
        shapes.append((len(features), *near.positive.shape, *near.negative.shape))
        return whole_set_terms(features, near, margin)

    monkeypatch.setattr(training, "whole_set_terms", looking)
    fit(small(), *tensors(toy), Recipe(epochs=1, batch_size=24, k=2, m=1, search_every=1))
    assert shapes == [(24, 6, 2, 6, 1)] * 3  # 24 / (1 + 2 + 1) anchors with theirs


@pytest.mark.parametrize("loss", ["deep-knn", "triplet", "weighted-ce"])
def test_feature_vectors_train_an_mlp(toy, loss):
    _, labels = tensors(toy)
    noise = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.one_hot(labels, 3).float() @ torch.randn(3, 10, generator=noise)
    vectors = centers + 1.2 * torch.randn(60, 10, generator=noise)
    network = build_network("mlp", n_inputs=10, n_classes=3 if loss == "weighted-ce" else None)
    before = vectors.clone()
    history = fit(network, vectors, labels, Recipe(loss=loss, epochs=5, batch_size=24, k=3, m=3, lr=0.02))
    assert torch.equal(vectors, before)  # taken as they are
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["train_acc"] > leave_one_out_accuracy(vectors, labels)
    features = extract_features(network, vectors, batch_size=7)
    assert features.shape == (60, 128) and features.dtype == torch.float32 and not network.training
    torch.testing.assert_close(features, network(vectors).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong, said", [
    ({"soft": True}, "soft is the triplet loss's; deep-knn has a margin"),
    ({"loss": "weighted-ce", "soft": True}, "soft is the triplet loss's"),
    ({"loss": "triplet", "search_every": 5}, "search_every is for the deep kNN loss, not for triplet"),
    ({"loss": "weighted-ce", "search_every": 5}, "not for weighted-ce"),
    ({"warmup": -1}, "warmup and search_every are 0 or more, got -1 and 0"),
    ({"search_every": -2}, "0 or more, got 0 and -2"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_meant_is_an_error(wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**wrong)


def test_features_come_from_the_central_crop_in_evaluation_mode(toy):
    images, _ = tensors(toy)
    network = small()
    network.train()
    features = extract_features(network, images, batch_size=7)
    assert features.shape == (60, 128) and not network.training
    changed = images.clone()
    changed[:, :, :2] = 255  # rows 0 and 1 of 32 lie outside the central 28
    assert torch.equal(features, extract_features(network, changed, batch_size=7))
    torch.testing.assert_close(features, extract_features(network, images, batch_size=60), rtol=1e-4, atol=1e-5)


def test_leave_one_out_accuracy_by_hand():
    features = torch.tensor([[0.0], [1.0], [2.1], [10.0], [11.0], [2.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # the last point, class 1, sits among class 0; as nearest neighbour it also spoils points 1 (tie-free: 2.0) and 2
    assert leave_one_out_accuracy(features, labels, k_predict=1) == pytest.approx(100 * 4 / 6)


def test_a_loss_that_is_no_longer_finite_is_an_error(toy):
    network = small(normalize="none")
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit(network, *tensors(toy), RECIPE)


def test_an_unknown_loss_is_an_error(toy):
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        fit(small(), *tensors(toy), Recipe(loss="hinge"))


class Constant(torch.nn.Module):
    """A backbone whose features have shrunk to (nearly) one point."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1e-6))

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


def test_a_collapsed_run_is_called_so_with_advice(toy):
    network = Network(Constant(), 3)
    with pytest.warns(UserWarning, match="the embedding collapsed. Use"):
        history = fit(network, *tensors(toy), Recipe(loss="triplet", epochs=1, batch_size=24, k=3, lr=1e-9, margin=0.2))
    assert history[-1]["active"] == 1 and history[-1]["loss"] == pytest.approx(0.2, rel=1e-3)
    assert collapsed(history, Recipe(loss="triplet"))
    assert not collapsed([history[-1] | {"spread": 1.4}], Recipe(loss="triplet"))
    assert not collapsed(history, Recipe(loss="weighted-ce"))


def test_a_soft_triplet_that_collapsed_settled_at_ln_2(toy):
    recipe = Recipe(loss="triplet", soft=True, margin=0.2, epochs=1, batch_size=24, k=3, lr=1e-9)
    with pytest.warns(UserWarning, match="settled at 0.693"):
        history = fit(Network(Constant(), 3), *tensors(toy), recipe)
    assert history[-1]["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert history[-1]["active"] == 0  # the classes differ in brightness: every positive is still the nearer one
    assert collapsed(history, recipe)
    assert not collapsed([history[-1] | {"loss": 0.5}], recipe)  # under the 0.693 of one point: something was told apart
    assert collapsed([history[-1] | {"loss": 0.5}], replace(recipe, soft=False))  # a hinge of 0.2 cannot do that
    assert not collapsed([history[-1] | {"spread": 0.4}], recipe) and not collapsed([], recipe)


def test_batch_l2_features_cannot_shrink_to_a_point(toy):
    images, _ = tensors(toy)
    network = Network(Constant(), 3, normalize="batch-l2").train()
    spread = torch.pdist(network(images.float() / 255)).mean()
    assert spread > 0.5  # the same backbone without it gives 1e-7


@pytest.mark.parametrize("changes", [{}, {"search_every": 2}])
def test_images_that_stay_on_disk_train_to_the_same_weights(toy, tmp_path, changes):
    images, labels = tensors(toy)
    np.save(tmp_path / "images.npy", toy[0])
    order = np.arange(len(labels))
    on_disk = Rows(np.load(tmp_path / "images.npy", mmap_mode="r"), order)
    recipe = Recipe(loss="deep-knn", epochs=2, batch_size=24, k=3, m=3, sampling="balanced", lr=0.05, **changes)
    first, second = small(), small()
    histories = [fit(network, inputs, labels, recipe) for network, inputs in ((first, images), (second, on_disk))]
    assert [row["loss"] for row in histories[0]] == [row["loss"] for row in histories[1]]
    assert torch.equal(weights(first), weights(second))
