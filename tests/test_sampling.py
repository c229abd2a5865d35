"""What every batch and every epoch is promised to hold, on long-tailed labels."""

from collections import Counter

import pytest
import torch

from deepknn_lib.sampling import BatchSampler


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shuffled(counts, seed=0):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=generator(seed))]


def epochs(count, labels, *args, **options):
    """Batches of some epochs of one sampler, each drawn with a generator of its own, as training does."""
    sampler = BatchSampler(labels, *args, **options)
    return [sampler.epoch(generator(epoch)) for epoch in range(count)]


@pytest.mark.parametrize("mode", ["proportional", "balanced"])
@pytest.mark.parametrize("seed", range(8))
def test_batches_have_k_plus_1_of_each_class_and_epochs_all_images_before_any_comes_twice(mode, seed):
    sizes = 1 + 300 * torch.rand(2 + 3 * seed % 11, generator=generator(seed)) ** 4
    labels, k = shuffled(sizes.long().tolist(), seed), 1 + seed % 5
    batch_size, seen = 2 * (k + 1) + seed * 3, torch.zeros(len(labels), dtype=torch.int64)
    n_classes = min(len(sizes), batch_size // (k + 1))  # as many as fit
    for batches in epochs(3, labels.numpy() if seed % 2 else labels, batch_size, mode, k + 1):
        for batch in batches:
            held = Counter(labels[batch].tolist())
            assert len(batch) == batch_size and len(held) == n_classes and min(held.values()) >= k + 1
            assert mode == "proportional" or max(held.values()) - min(held.values()) <= 1
            for label, count in held.items():  # An image comes twice only if its class is too small.
                times, size = batch[labels[batch] == label].bincount(), int((labels == label).sum())
                assert (times > 0).sum() == min(count, size) and times.max() == -(-count // size)
        assert len(labels[torch.cat(batches)].unique()) == len(sizes)
        assert len(batches) == max(-(-len(labels) // batch_size), -(-len(sizes) // n_classes))
        seen += torch.cat(batches).bincount(minlength=len(labels))
        assert all(seen[labels == c].max() - seen[labels == c].min() <= 1 for c in range(len(sizes)))


def test_batches_by_hand_of_skin7_and_of_sd198_whose_classes_take_turns():
    # Above the floor of 6, the three largest classes of Skin-7 share 72 of 96 images: 72 / 8917 of each.
    labels = shuffled([6705, 1113, 1099, 514, 327, 142, 115])
    ((batch, *_),) = epochs(1, labels, 96, "proportional", 6)
    assert labels[batch].bincount().tolist() == [54, 9, 9, 6, 6, 6, 6]
    labels, turns = shuffled(torch.randint(9, 61, (198,), generator=generator()).tolist()), 0
    for batches in epochs(3, labels, 90, "balanced", classes_per_batch=9):
        held = torch.stack([labels[batch].bincount(minlength=198) for batch in batches])
        assert ((held == 10).sum(1) == 9).all()
        turns += (held == 10).sum(0)
        assert turns.min() > 0 and turns.max() - turns.min() <= 1


@pytest.mark.parametrize("count, sizes", [(100, [32, 32, 32, 4]), (97, [32, 32, 33]), (5, [5])])
def test_random_is_a_plain_shuffle_whose_last_batch_is_never_one_image(count, sizes):
    (batches,) = epochs(1, torch.arange(count) % 2, 32, "random")
    assert [len(batch) for batch in batches] == sizes
    order = torch.cat(batches).tolist()
    assert order != sorted(order) == [*range(count)]
