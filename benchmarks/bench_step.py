"""A step of `training.fit` in the demo profile, for every loss, on images of noise; what the first epoch reports."""

import pytest
import torch

from deepknn_lib.criteria import LOSSES
from deepknn_lib.models import SMALL, build_network
from deepknn_lib.training import TrainingConfig, fit

pytest.importorskip("pytest_benchmark")
STEPS = 10


@pytest.mark.parametrize("loss", LOSSES)
def bench_step(benchmark, loss):
    benchmark.group = f"{STEPS} steps of {SMALL}, 42 pixels, batch 96, and the accuracy of the epoch"
    config = TrainingConfig(loss=loss, epochs=1, batch_size=96, lr=1e-4)
    images = torch.randint(0, 256, (STEPS * 96, 3, 48, 48), dtype=torch.uint8)
    labels, seconds = torch.arange(STEPS * 96) % 7, []
    network = build_network(SMALL, n_classes=7 if loss == "weighted-ce" else None, normalize="batch-l2")

    def steps():
        seconds.append(fit(network, images, labels, config)[0]["seconds"])

    benchmark.pedantic(steps, rounds=5, warmup_rounds=1)
    benchmark.extra_info["ms a step"] = 1000 * sorted(seconds)[len(seconds) // 2] / STEPS
