"""The training loop: it learns, it repeats itself, it resumes, and it says when something is wrong."""

import math

import pytest
import torch

from deepknn_lib.models import Network, build_network
from deepknn_lib.training import Recipe, collapsed, extract_features, fit, leave_one_out_accuracy

RECIPE = Recipe(epochs=3, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=1)


def small(seed=0, loss="deep-knn", normalize="batch-l2"):
    return build_network("small-resnet", n_classes=3 if loss == "weighted-ce" else None, normalize=normalize, seed=seed)


def tensors(toy):
    return torch.from_numpy(toy[0]), torch.from_numpy(toy[1])


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("loss", ["deep-knn", "triplet", "weighted-ce"])
def test_every_loss_learns_an_easy_set(toy, loss):
    network = small(loss=loss, normalize="none" if loss == "weighted-ce" else "batch-l2")
    recipe = Recipe(loss=loss, epochs=6, batch_size=24, k=3, m=3, lr=0.05, lr_decay_every=3)
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


def test_a_killed_run_resumes_and_ends_with_the_same_weights(toy, tmp_path):
    whole = small()
    history = fit(whole, *tensors(toy), RECIPE)

    class Killed(Exception):
        pass

    def kill(row):
        if row["epoch"] == 2:
            raise Killed

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        fit(small(), *tensors(toy), RECIPE, checkpoint=checkpoint, on_epoch=kill)
    assert checkpoint.is_file()
    resumed, seen = small(seed=5), []  # another start, to show that the state comes from the checkpoint
    again = fit(resumed, *tensors(toy), RECIPE, checkpoint=checkpoint, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [2, 3]  # epoch 1 was not trained again
    assert torch.equal(weights(whole), weights(resumed))
    assert [row["loss"] for row in again] == [row["loss"] for row in history]


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


def test_batch_l2_features_cannot_shrink_to_a_point(toy):
    images, _ = tensors(toy)
    network = Network(Constant(), 3, normalize="batch-l2").train()
    spread = torch.pdist(network(images.float() / 255)).mean()
    assert spread > 0.5  # the same backbone without it gives 1e-7
