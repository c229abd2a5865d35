"""The training loop: it learns, it repeats itself, it resumes, and it says when something is wrong."""

import os
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deepknn_lib import criteria, models
from deepknn_lib.models import Network, build_network
from deepknn_lib.training import TrainingConfig, collapsed, fit, leave_one_out_accuracy

CONFIG = TrainingConfig(epochs=3, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=1)


def train(images, labels, config=CONFIG, seed=0, **options):
    """Weights and history of a small network after training."""
    n_classes, normalize = (3, "none") if config.loss == "weighted-ce" else (None, "batch-l2")
    network = build_network("small-resnet", n_classes=n_classes, normalize=normalize, seed=seed)
    inputs = images if isinstance(images, np.memmap) else torch.from_numpy(images)
    history = fit(network, inputs, torch.from_numpy(labels), config, **options)
    return torch.cat([p.detach().flatten() for p in network.parameters()]), history


@pytest.mark.parametrize("loss, changes", [
    *((loss, {}) for loss in criteria.LOSSES), ("deep-knn", {"search_every": 2}), ("triplet", {"soft": True})
])  # fmt: skip
def test_every_loss_learns_an_easy_set(toy, loss, changes):
    _, history = train(*toy, replace(CONFIG, loss=loss, epochs=6, lr_decay_every=3, **changes))
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["train_acc"] > 90
    assert all(0 <= row["active"] <= 1 for row in history) == (loss in ("deep-knn", "triplet", "semi-hard"))


@pytest.mark.parametrize("loss", ["triplet", "semi-hard", "supcon", "multi-similarity"])
def test_a_rival_gives_0_with_a_gradient_where_there_is_no_pair(loss):
    features, labels = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    rival = criteria.criterion_of(replace(CONFIG, loss=loss), Network(nn.Identity(), 8), None, labels)
    (value := rival(features, labels, None)[0]).backward()
    assert value == 0 and features.grad is not None


@pytest.mark.parametrize("changes", [
    {}, {"search_every": 2, "warmup": 2}, {"loss": "proxy-anchor"}, {"loss": "weighted-ce", "sampling": "random"}
], ids=str)  # fmt: skip
def test_a_killed_run_resumes_and_ends_with_the_same_weights(toy, tmp_path, changes):
    config, checkpoint, seen = replace(CONFIG, **changes), tmp_path / "folder" / "state.pt", []
    weights, history = train(*toy, config)
    with pytest.raises(KeyboardInterrupt):
        train(*toy, config, checkpoint=checkpoint, on_epoch=mock.Mock(side_effect=[None, KeyboardInterrupt]))
    torch.manual_seed(2)  # Nothing outside the seed may matter, nor where the second network starts.
    resumed, again = train(*toy, config, seed=5, checkpoint=checkpoint, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [2, 3]  # Epoch 1 was not trained again.
    assert torch.equal(weights, resumed) and [r["loss"] for r in again] == [r["loss"] for r in history]
    assert not torch.equal(weights, train(*toy, replace(config, seed=1))[0])


def test_a_checkpoint_of_another_training_or_with_code_or_cut_short_is_refused(toy, tmp_path):
    (images, labels), path = toy, tmp_path / "state.pt"
    train(*toy, checkpoint=path)
    whole = path.read_bytes()
    torch.save(torch.load(path) | {"code": os.getcwd}, path)
    for content, *changed, told in (
        (whole, images, labels, replace(CONFIG, lr=0.1), "of another training"),
        (whole, images, labels[::-1].copy(), CONFIG, "of another training"),
        (whole, images[::-1].copy(), labels, CONFIG, "of another training"),
        (path.read_bytes(), *toy, CONFIG, ""), (whole[:1000], *toy, CONFIG, ""),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"state.pt.*{told}.*remove it"):
            train(*changed, checkpoint=str(path))


@pytest.mark.parametrize("warmup", [0, 2])
def test_warm_up_raises_the_learning_rate_step_by_step(toy, warmup):
    used = []
    hook = register_optimizer_step_pre_hook(lambda sgd, *_: used.append(sgd.param_groups[0]["lr"]))
    _, history = train(*toy, replace(CONFIG, epochs=4, lr_decay_every=3, warmup=warmup))
    hook.remove()
    rising = [0.05 * min((n + 1) / (3 * max(warmup, 1e-9)), 1) for n in range(9)]  # An epoch has 3 steps.
    assert used == pytest.approx(rising + [0.025] * 3) and [row["lr"] for row in history] == used[2::3]


@pytest.mark.parametrize("every, searches", [(0, 0), (1, 6), (2, 4), (99, 2)])
def test_the_whole_set_is_searched_as_often_as_asked_for_anchors(toy, monkeypatch, every, searches):
    search, terms = (mock.Mock(wraps=f) for f in (criteria.whole_set_neighbors, criteria.whole_set_terms))
    monkeypatch.setattr(criteria, "whole_set_neighbors", search)
    monkeypatch.setattr(criteria, "whole_set_terms", terms)
    train(*toy, replace(CONFIG, epochs=2, k=2, m=1, search_every=every))
    assert search.call_count == searches
    # A batch holds 24 / (1 + 2 + 1) anchors with their neighbours.
    assert [call.args[1].positive.shape for call in terms.call_args_list] == ([(6, 2)] * 6 if every else [])


def test_images_on_disk_grey_images_and_a_last_batch_of_one_image_train_too(toy, tmp_path):
    images, labels = toy
    np.save(tmp_path / "images.npy", images)
    on_disk = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert torch.equal(train(*toy)[0], train(on_disk, labels)[0])
    assert train(images[:, :1], labels)[1][-1]["train_acc"] > 60
    config = replace(CONFIG, loss="weighted-ce", sampling="random", epochs=1)  # 49 = 2 · 24 + 1
    assert train(images[11:], labels[11:], config)[1][0]["loss"] > 0


def test_bf16_is_used_where_the_device_has_it_and_agrees_with_float32_within_seeds(toy, monkeypatch):
    full, other = (train(*toy, replace(CONFIG, seed=seed))[1][-1]["loss"] for seed in (0, 1))
    for there in (False, True):
        monkeypatch.setattr(models, "has_bf16", lambda _, there=there: there)
        half = train(*toy, replace(CONFIG, precision="bf16"))[1][-1]["loss"]
        assert (half == full) != there and abs(half - full) <= 2 * abs(other - full)


def test_leave_one_out_accuracy_by_hand():
    features = torch.tensor([[0.0], [1.0], [2.1], [10.0], [11.0], [2.0]])
    # The last point, of class 1, lies among class 0; it is also the nearest neighbour of the third point.
    assert leave_one_out_accuracy(features, torch.tensor([0, 0, 0, 1, 1, 1]), 1) == pytest.approx(100 * 4 / 6)


def test_what_cannot_be_trained_on_is_refused(toy):
    images, labels = toy
    with pytest.raises(ValueError, match="images must be uint8, 0 to 255, got torch.float32"):
        train(images / np.float32(255), labels)
    with pytest.raises(ValueError, match="weighted-ce needs a network with a classifier"):
        fit(build_network("small-resnet"), *map(torch.from_numpy, toy), replace(CONFIG, loss="weighted-ce"))


def test_collapse_is_a_warning_with_advice():
    torch.manual_seed(0)
    noise = torch.randint(256, (96, 3, 16, 16), dtype=torch.uint8)  # nothing to learn
    network = Network(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), 3)
    config = replace(CONFIG, loss="triplet", margin=5.0, epochs=20, lr=0.1, lr_decay_every=5)
    with pytest.warns(UserWarning, match="the embedding collapsed.*use normalised features"):
        fit(network, noise, torch.arange(96) % 3, config)


@pytest.mark.parametrize("loss, distance, config, expected", [
    (0.2, 0.05, {}, True), (0.2, 1.4, {}, False), (0.1, 0.05, {}, False), (0.2, 0.05, {"loss": "supcon"}, False),
    (0.2, 0.05, {"loss": "triplet", "soft": True}, False),  # 0.2 is far under the ln 2 of one point.
    (0.7, 0.05, {"loss": "triplet", "soft": True}, True),
])  # fmt: skip
def test_collapse_is_a_settled_triplet_loss_with_all_features_in_one_point(loss, distance, config, expected):
    row = {"mean_pairwise_distance": distance, "start_distance": 1.5, "epoch": 1, "loss": loss}
    assert collapsed([row], TrainingConfig(**config)) == expected
