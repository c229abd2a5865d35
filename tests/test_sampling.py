"""What every batch and every epoch is promised to hold, on long-tailed labels."""

from collections import Counter

import pytest
import torch

from deepknn_lib.sampling import BatchSampler

SKIN7 = [6705, 1113, 1099, 514, 327, 142, 115]
stratified = pytest.mark.parametrize("mode", ["proportional", "balanced"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shuffled(counts, seed=0):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=generator(seed))]


def epochs(count, labels, *args, seed=0, **options):
    """Batches of some epochs of one sampler, each drawn with a generator of its own, as training does."""
    sampler = BatchSampler(labels, *args, **options)
    return [sampler.epoch(generator(1000 * seed + epoch)) for epoch in range(count)]


@stratified
@pytest.mark.parametrize("seed", range(8))
def test_batches_have_their_size_k_plus_1_of_each_class_and_all_classes_an_epoch(mode, seed):
    sizes = 1 + 300 * torch.rand(2 + 3 * seed % 11, generator=generator(seed)) ** 4
    labels, k = shuffled(sizes.long().tolist(), seed), 1 + seed % 5
    batch_size = 2 * (k + 1) + seed * 3
    n_classes = min(len(sizes), batch_size // (k + 1))  # as many as fit
    for batches in epochs(2, labels, batch_size, mode, k + 1, seed=seed):
        for batch in batches:
            held = Counter(labels[batch].tolist())
            assert batch.shape == (batch_size,) and batch.dtype == torch.int64
            assert len(held) == n_classes and min(held.values()) >= k + 1
            assert mode == "proportional" or max(held.values()) - min(held.values()) <= 1
            for label, count in held.items():  # An image comes twice only if its class is too small.
                times, size = batch[labels[batch] == label].bincount(), int((labels == label).sum())
                assert (times > 0).sum() == min(count, size) and times.max() == -(-count // size)
        assert torch.equal(labels[torch.cat(batches)].unique(), labels.unique())
        assert len(batches) == max(-(-len(labels) // batch_size), -(-len(sizes) // n_classes))


@stratified
@pytest.mark.parametrize("counts, batch_size", [([150, 60, 30, 7], 40), (SKIN7, 96)])
def test_each_image_of_a_class_comes_up_before_any_comes_twice_also_over_epochs(mode, counts, batch_size):
    labels = shuffled(counts)
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for batches in epochs(5, labels, batch_size, mode, 5):
        seen += torch.cat(batches).bincount(minlength=len(labels))
        for label in range(len(counts)):
            assert seen[labels == label].max() - seen[labels == label].min() <= 1


def test_sd198_batches_hold_10_images_of_each_of_9_classes_and_classes_take_turns():
    labels, seen = shuffled(torch.randint(9, 61, (198,), generator=generator()).tolist()), Counter()
    for batches in epochs(3, labels, 90, "balanced", classes_per_batch=9):
        for batch in batches:
            held = Counter(labels[batch].tolist())
            assert len(held) == 9 and set(held.values()) == {10}
            seen.update(held.keys())
        assert len(seen) == 198 and max(seen.values()) - min(seen.values()) <= 1


def test_proportional_batches_by_hand():
    # Above the floor of 6, three classes share 72 of 96 images: 72 / 8917 of each.
    (batches,) = epochs(1, shuffled(SKIN7), 96, "proportional", 6)
    assert shuffled(SKIN7)[batches[0]].bincount().tolist() == [54, 9, 9, 6, 6, 6, 6]


@pytest.mark.parametrize("count, sizes", [(100, [32, 32, 32, 4]), (97, [32, 32, 33]), (33, [33]), (5, [5])])
def test_random_is_a_plain_shuffle_whose_last_batch_is_never_one_image(count, sizes):
    (batches,) = epochs(1, torch.arange(count) % 2, 32, "random")
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(count))
    assert not torch.equal(torch.cat(batches), torch.arange(count))


@pytest.mark.parametrize("labels, batch_size, options, told", [
    ([0, 1], 12, {"mode": "stratified"}, "unknown sampling mode 'stratified'"), ([], 12, {}, "at least 1"),
    ([7, -2], 11, {}, "cannot hold 2 classes with 6"),
    ([0, 1, 2], 17, {"classes_per_batch": 3}, "cannot hold 3 classes with 6"),
    ([0, 1, 2], 18, {"classes_per_batch": 1}, "cannot hold 2 classes"),
])  # fmt: skip
def test_impossible_batches_are_refused(labels, batch_size, options, told):
    with pytest.raises(ValueError, match=told):
        BatchSampler(torch.tensor(labels, dtype=torch.int64), batch_size, **options)
