"""The training loop: it learns, it repeats itself, it resumes, and it says when something is wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepknn_lib import criteria
from deepknn_lib.criteria import LOSSES, whole_set_neighbors
from deepknn_lib.models import Network, build_network
from deepknn_lib.training import TrainingConfig, collapsed, fit, leave_one_out_accuracy

CONFIG = TrainingConfig(epochs=3, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=1)
DONE = {"epoch": 1, "loss": 0.2, "mean_pairwise_distance": 1e-3}


def small(seed=0, loss="deep-knn", normalize="batch-l2"):
    return build_network(
        "small-resnet", n_classes=3 if loss == "weighted-ce" else None, normalize=normalize, seed=seed
    )


def tensors(toy):
    return torch.from_numpy(toy[0]), torch.from_numpy(toy[1])


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize(
    "loss, changes",
    [*((loss, {}) for loss in LOSSES), ("deep-knn", {"search_every": 2}), ("triplet", {"soft": True})],
)
def test_every_loss_learns_an_easy_set(toy, loss, changes):
    network = small(loss=loss, normalize="none" if loss == "weighted-ce" else "batch-l2")
    config = replace(CONFIG, loss=loss, epochs=6, lr_decay_every=3, **changes)
    history = fit(network, *tensors(toy), config)
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["train_acc"] > 90
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in history] == [0.05] * 3 + [0.025] * 3
    assert all(0 <= row["active"] <= 1 for row in history) == (loss in ("deep-knn", "triplet", "semi-hard"))
    assert all(row["mean_pairwise_distance"] > 0 and row["seconds"] > 0 for row in history)


def test_the_loss_goes_through_pytorch_metric_learning_with_the_margin_of_the_config(toy):
    """Of one point: batch-hard gives the margin, its soft form ln 2, and both count every anchor or none."""
    for soft, expected in ((False, 0.3), (True, math.log(2))):
        config = replace(CONFIG, loss="triplet", margin=0.3, soft=soft)
        criterion = criteria.criterion_of(config, small(), *tensors(toy))
        loss, active = criterion(torch.ones(60, 4), tensors(toy)[1], None)
        assert loss.item() == pytest.approx(expected, abs=1e-4) and active == (0 if soft else 1)


@pytest.mark.parametrize("loss", ["triplet", "semi-hard", "supcon", "multi-similarity"])
def test_a_rival_gives_0_with_a_gradient_where_there_is_no_pair(loss):
    features = torch.randn(4, 8, requires_grad=True)
    criterion = criteria.criterion_of(replace(CONFIG, loss=loss), small(), None, torch.arange(4))
    value, _ = criterion(features, torch.arange(4), None)
    value.backward()
    assert value == 0 and features.grad is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"search_every": 2, "warmup": 2},
        {"loss": "proxy-anchor"},
        {"loss": "weighted-ce", "sampling": "random"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "in the batch",
)
def test_a_killed_run_resumes_and_ends_with_the_same_weights(toy, tmp_path, changes):
    config = replace(CONFIG, **changes)
    whole = small(loss=config.loss)
    torch.manual_seed(1)  # Nothing outside the seed may matter.
    history = fit(whole, *tensors(toy), config)

    def kill(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "folder" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(small(loss=config.loss), *tensors(toy), config, checkpoint=checkpoint, on_epoch=kill)
    torch.manual_seed(2)
    resumed, seen = (
        small(seed=5, loss=config.loss),
        [],
    )  # Another start shows that the checkpoint is what counts.
    again = fit(resumed, *tensors(toy), config, checkpoint=checkpoint, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [2, 3]  # Epoch 1 was not trained again.
    assert torch.equal(weights(whole), weights(resumed))
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    other = small(loss=config.loss)
    fit(other, *tensors(toy), replace(config, seed=1))
    assert not torch.equal(weights(whole), weights(other))


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(toy, tmp_path):
    images, labels = tensors(toy)
    checkpoint = tmp_path / "state.pt"
    fit(small(), images, labels, CONFIG, checkpoint=checkpoint)
    for config, some in ((replace(CONFIG, lr=0.1), labels), (CONFIG, labels.flip(0))):
        with pytest.raises(ValueError, match="state.pt.* of another training.*remove it"):
            fit(small(), images, some, config, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="state.pt.*remove it"):
        fit(small(), images, labels, CONFIG, checkpoint=checkpoint)


def test_a_checkpoint_that_holds_code_is_not_run(toy, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path / "harmed").touch, ()

    torch.save({"history": Harm()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt"):
        fit(small(), *tensors(toy), CONFIG, checkpoint=tmp_path / "state.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_warm_up_raises_the_learning_rate_step_by_step(toy, monkeypatch, warmup):
    used, step = [], torch.optim.SGD.step

    def recording(self, closure=None):
        used.extend(group["lr"] for group in self.param_groups)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", recording)
    history = fit(small(), *tensors(toy), replace(CONFIG, epochs=4, lr_decay_every=3, warmup=warmup))
    rising = [
        0.05 * min((n + 1) / (3 * max(warmup, 1e-9)), 1) for n in range(9)
    ]  # 3 steps are ceil(60 / 24).
    assert used == pytest.approx(rising + [0.025] * 3)
    assert [row["lr"] for row in history] == used[2::3]


@pytest.mark.parametrize("every, searches", [(0, 0), (1, 6), (2, 4), (99, 2)])
def test_the_whole_set_is_searched_as_often_as_asked_and_a_step_costs_a_batch(
    toy, monkeypatch, every, searches
):
    sizes, batches, terms = [], [], criteria.whole_set_terms

    def searching(features, labels, k, m):
        sizes.append(len(features))
        return whole_set_neighbors(features, labels, k, m)

    def stepping(features, near, margin):
        batches.append((len(features), *near.positive.shape, *near.negative.shape))
        return terms(features, near, margin)

    monkeypatch.setattr(criteria, "whole_set_neighbors", searching)
    monkeypatch.setattr(criteria, "whole_set_terms", stepping)
    fit(small(), *tensors(toy), replace(CONFIG, epochs=2, k=2, m=1, search_every=every))
    assert sizes == [60] * searches
    assert batches == (
        [(24, 6, 2, 6, 1)] * 6 if every else []
    )  # 24 / (1 + 2 + 1) anchors with their neighbours


def test_a_last_batch_of_one_image_is_trained_with_the_one_before(toy):
    images, labels = tensors(toy)
    config = replace(CONFIG, loss="weighted-ce", sampling="random", epochs=1)
    assert fit(small(loss="weighted-ce"), images[11:], labels[11:], config)[0]["loss"] > 0


def test_images_that_stay_on_disk_and_grey_images_train_too(toy, tmp_path):
    images, labels = tensors(toy)
    np.save(tmp_path / "images.npy", toy[0])
    on_disk = np.load(tmp_path / "images.npy", mmap_mode="r")
    first, second = small(), small()
    fit(first, images, labels, CONFIG)
    fit(second, on_disk, labels, CONFIG)
    assert torch.equal(weights(first), weights(second))
    assert fit(small(), images[:, :1], labels, CONFIG)[-1]["train_acc"] > 60


@pytest.mark.parametrize("loss", ["deep-knn", "weighted-ce"])
def test_feature_vectors_train_an_mlp_as_they_are(toy, loss):
    labels, noise = tensors(toy)[1], torch.Generator().manual_seed(0)
    centers = torch.nn.functional.one_hot(labels, 3).float() @ torch.randn(3, 10, generator=noise)
    vectors = centers + 1.2 * torch.randn(60, 10, generator=noise)
    network = build_network("mlp", n_inputs=10, n_classes=3 if loss == "weighted-ce" else None)
    before = vectors.clone()
    history = fit(network, vectors, labels, replace(CONFIG, loss=loss, epochs=5, lr=0.02, lr_decay_every=0))
    assert torch.equal(vectors, before) and history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["train_acc"] > leave_one_out_accuracy(vectors, labels)


def test_leave_one_out_accuracy_by_hand():
    features = torch.tensor([[0.0], [1.0], [2.1], [10.0], [11.0], [2.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # The last point, of class 1, lies among class 0; it is also the nearest neighbour of the third point.
    assert leave_one_out_accuracy(features, labels, k_predict=1) == pytest.approx(100 * 4 / 6)


# What goes wrong


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'; choose one of deep-knn, "),
        ({"soft": True}, "soft is for .*; the loss is deep-knn"),
        ({"loss": "triplet", "search_every": 5}, "search_every for deep-knn; the loss is triplet"),
        ({"warmup": -1}, "below 0"),
        ({"search_every": -2}, "below 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr above 0"),
    ],
)
def test_a_config_that_cannot_be_trained_is_an_error(wrong, told):
    with pytest.raises(ValueError, match=told):
        TrainingConfig(**wrong)


def test_a_learning_rate_that_diverges_is_an_error(toy):
    config = replace(CONFIG, loss="weighted-ce", lr=1e6, lr_decay_every=0)
    with pytest.raises(FloatingPointError, match="weighted-ce loss is (nan|inf) in epoch .* lower lr"):
        fit(small(loss="weighted-ce", normalize="none"), *tensors(toy), config)


@pytest.mark.parametrize("loss", ["deep-knn", "triplet"])
def test_a_loss_of_weights_that_are_not_numbers_is_an_error(toy, loss):
    network = small(normalize="none")
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises((FloatingPointError, ValueError), match="lower lr|not finite"):
        fit(network, *tensors(toy), replace(CONFIG, loss=loss))


class Shrunk(torch.nn.Module):
    """A backbone whose features have shrunk to (nearly) one point."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1e-6))

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


@pytest.mark.parametrize(
    "loss, soft, settled", [("deep-knn", False, 0.2), ("triplet", False, 0.2), ("triplet", True, 0.69315)]
)
def test_a_collapsed_run_is_called_so_with_advice(toy, loss, soft, settled):
    config = replace(CONFIG, loss=loss, soft=soft, epochs=1, lr=1e-9)
    with pytest.warns(UserWarning, match="the embedding collapsed.*use normalised features"):
        history = fit(Network(Shrunk(), 3), *tensors(toy), config)
    assert history[-1]["loss"] == pytest.approx(settled, rel=1e-3)


@pytest.mark.parametrize(
    "changes, config, expected",
    [
        ({}, {}, True),
        ({}, {"loss": "semi-hard"}, True),
        ({"mean_pairwise_distance": 1.4}, {}, False),
        ({"loss": 0.1}, {}, False),
        (
            {},
            {"loss": "triplet", "soft": True},
            False,
        ),  # A soft loss of 0.2 is far under the 0.693 of one point.
        ({"loss": 0.7}, {"loss": "triplet", "soft": True}, True),
        ({}, {"loss": "weighted-ce"}, False),
        ({}, {"loss": "supcon"}, False),
    ],
)
def test_collapse_is_a_settled_triplet_loss_with_all_features_in_one_point(changes, config, expected):
    config = TrainingConfig(**config)
    assert collapsed([DONE | changes], config) == expected and not collapsed([], config)
