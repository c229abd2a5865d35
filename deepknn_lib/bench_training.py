"""What `python -m deepknn_lib bench` compares of training: steps, losses, and on a GPU whole epochs."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from deepknn_lib.bench import OURS, PML, absent, alternate, fresh_peak, installed, judged, rows_of, slope

K = M = 5


def _stepper(run, network, batch: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One bare training step on one prepared batch: forward, loss, backward, SGD."""
    from deepknn_lib.losses import class_weights, deep_knn_loss

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=run.momentum, weight_decay=run.weight_decay)
    weights = class_weights(labels.cpu(), 7).to(labels.device)
    network.train()

    def step() -> torch.Tensor:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.is_cuda):
            features = network(batch)
            logits = network.classifier(features) if network.classifier else None
        if logits is None:
            loss = deep_knn_loss(features, labels, run.k, run.m, run.margin)
        else:
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, weight=weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _trainings(device: torch.device, quick: bool, steps: int) -> tuple:
    """Bare steps and whole `training.fit` epochs of deep kNN and of cross-entropy, by name, on images of noise; its run."""
    from deepknn_lib.augment import crop_size, normalize
    from deepknn_lib.models import build_network
    from deepknn_lib.runs import make_run
    from deepknn_lib.training import fit

    changes = {"weights": "none", "lr": 1e-4, "warmup": 0, "epochs": 1}  # noise teaches nothing; a step costs the same
    if quick:
        changes |= {"image_size": 32, "batch_size": 42, "backbone": "small-resnet"}
    bare, whole = {}, {}
    for title, method in (("deep kNN", "deep-knn"), ("weighted cross-entropy", "weighted-ce")):
        run = make_run("lesions", method, "paper" if device.type == "cuda" else "demo", **changes)
        size, count = run.image_size, run.batch_size * steps
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8).to(device)
        labels = torch.arange(count).to(device) % 7
        crop = crop_size(size)
        batch = normalize(images[: run.batch_size, :, :crop, :crop]).contiguous(memory_format=torch.channels_last)
        network = build_network(run.backbone, n_classes=None if method == "deep-knn" else 7, normalize=run.normalize)
        network.to(device, memory_format=torch.channels_last)

        def epoch(network=network, images=images, labels=labels, recipe=run.recipe) -> float:
            return fit(network, images, labels, recipe)[0]["seconds"] / steps

        bare[title], whole[title] = _stepper(run, network, batch, labels[: run.batch_size]), epoch
    return bare, whole, run, f"{run.backbone}, {crop} pixels, batch {run.batch_size}"


def step(device: torch.device, quick: bool) -> Iterator[list[dict]]:
    """A training step with the deep kNN loss next to one with weighted cross-entropy: bare, and as `training.fit` does it.

    Noise for images; the demo's network and sizes on a CPU, the paper's on a GPU.
    """
    bare, whole, _, setting = _trainings(device, quick, 2 if quick else 10)
    most = 3 if quick else 300
    yield rows_of(f"bare step: {setting}", alternate(bare, device, 3, most, seconds=60), 1 / 1.03)
    yield rows_of(f"a step of training.fit: {setting}", alternate(whole, device, 3, most, seconds=90), 1 / 1.03)


def losses(size: int, width: int, device: torch.device, mined: bool = True) -> dict[str, Callable]:
    """Loss and gradient: ours searches its triplets, theirs is given them."""
    from deepknn_lib.losses import deep_knn_loss
    from deepknn_lib.neighbors import batch_neighbors

    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(size, width, generator=generator), dim=1).to(device)
    features.requires_grad_()
    labels = torch.arange(size, device=device) % 7

    def result(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loss.detach(), torch.autograd.grad(loss, features)[0]

    calls = {OURS: lambda: result(deep_knn_loss(features, labels, K, M, 0.2))}
    if installed(PML):
        from pytorch_metric_learning.distances import LpDistance
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.reducers import MeanReducer

        theirs = TripletMarginLoss(0.2, distance=LpDistance(normalize_embeddings=False, p=2), reducer=MeanReducer())
        anchor = torch.arange(size, device=device).repeat_interleave(K * M)
        if mined:
            near = batch_neighbors(features.detach(), labels, K, M)
            kept = (near.positive_valid[:, :, None] & near.negative_valid[:, None, :]).flatten()
            positive, negative = near.positive.repeat_interleave(M, dim=1), near.negative.repeat(1, K)
            triplets = tuple(part.flatten()[kept] for part in (anchor, positive, negative))
        else:  # for its memory any will do, and the search would leave its own behind
            triplets = anchor, *torch.randint(size, (2, len(anchor)), generator=generator).to(device)
        calls[PML] = lambda: result(theirs(features, labels, indices_tuple=triplets))
    return calls


def loss(device: torch.device, quick: bool) -> Iterator[list[dict]]:
    """The loss and its gradient, B images of D features; and how its memory grows with B."""
    sizes = (42, 84) if quick else (96, 256, 512, 1024, 2048, 4096, 8192)
    narrow = 16 if quick else 128
    wide = [(size, width) for width in (512, 2048) for size in sizes if size <= 2048] if not quick else []
    peaks = {OURS: {}, PML: {}}
    for size, width in [(size, narrow) for size in sizes] + wide:
        setting, calls = f"B={size}, D={width}, K=M={K}", losses(size, width, device)
        values = [float(call()[0]) for call in calls.values()]
        if not np.allclose(values, values[0], rtol=1e-4):
            raise ValueError(f"the losses differ at {setting}: {values}")
        rows = rows_of(setting, alternate(calls, device, 3, 3 if quick else 200, seconds=10), 1.0)
        if (size, width) not in wide and (quick or size >= 1024):
            for row in rows:
                row["peak_mb"] = peaks[row["what"]][size] = fresh_peak("loss", row["what"], device, (size, width), quick)
        yield rows + ([] if installed(PML) else [absent(PML, setting)])
    for what, found in peaks.items():
        if found:
            power = slope(found, found.values())
            row = {"what": what, "setting": f"peak memory, B={min(found)} to {max(found)}, D={narrow}", "median": power}
            row |= {"unit": "power of B", "repetitions": 1}
            yield [row | (judged(power, "power <= 2.2", power <= 2.2) if what == OURS else {})]


def epoch(device: torch.device, quick: bool) -> Iterator[list[dict]]:
    """For a GPU: `training.fit` next to its step fed one batch over and over; and that step next to a matrix product."""
    from torch.utils.flop_counter import FlopCounterMode

    steps, side = (2, 256) if quick else (100, 8192)
    bare, whole, run, setting = _trainings(device, quick, steps)
    step = bare["deep kNN"]

    def fixed() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            last = step()
        last.item()  # waits for the GPU
        return (time.perf_counter() - started) / steps

    least, most = (3, 3) if quick else (5, 10)
    times = alternate({"training.fit": whole["deep kNN"], "one fixed batch": fixed}, device, least, most, seconds=120)
    yield rows_of(f"deep kNN, {setting}", times, 0.95, images=run.batch_size)
    with FlopCounterMode(display=False) as counted:
        step()
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = alternate({"bf16 matrix product": lambda: a @ b}, device, least, 50)
    rates = {"deep kNN step": counted.get_total_flops() / times["one fixed batch"] / 1e12}
    rates |= {name: 2 * side**3 / spent / 1e12 for name, spent in product.items()}
    rows = [row for name, rate in rates.items() for row in rows_of(setting, {name: rate}, unit="TFLOP/s")]
    rows[1]["ratio"] = rows[0]["median"] / rows[1]["median"]  # the share of the machine's rate that the step reaches
    yield rows
