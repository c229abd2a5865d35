"""What every batch and every epoch is promised to hold, on random long-tailed labels."""

from collections import Counter

import pytest
import torch

from deepknn_lib.sampling import epoch_batches

SKIN7 = [6705, 1113, 1099, 514, 327, 142, 115]
stratified = pytest.mark.parametrize("mode", ["proportional", "balanced"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shuffled(counts, seed=0):
    """Labels with these class sizes, in random order."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=generator(seed))]


def long_tailed(seed):
    """2 to 12 classes from a few hundred images down to 1."""
    draw = generator(seed)
    n_classes = int(torch.randint(2, 13, (), generator=draw))
    sizes = 300 * torch.rand(n_classes, generator=draw) ** 4
    return shuffled((1 + sizes.long()).tolist(), seed)


def classes_of(batch, labels):
    return Counter(labels[batch].tolist())


@stratified
@pytest.mark.parametrize("seed", range(20))
def test_batches_have_their_size_k_plus_1_of_each_class_and_all_classes_an_epoch(mode, seed):
    labels = long_tailed(seed)
    k = 1 + seed % 5
    batch_size = 2 * (k + 1) + seed * 3
    n_classes = min(len(labels.unique()), batch_size // (k + 1))  # as many as fit
    batches = epoch_batches(labels, batch_size, mode=mode, min_per_class=k + 1, generator=generator(seed))
    for batch in batches:
        held = classes_of(batch, labels)
        assert batch.shape == (batch_size,) and batch.dtype == torch.int64
        assert len(held) == n_classes and min(held.values()) >= k + 1
    assert torch.equal(labels[torch.cat(batches)].unique(), labels.unique())
    enough = max(-(-len(labels) // batch_size), -(-len(labels.unique()) // n_classes))
    assert len(batches) == enough


@stratified
@pytest.mark.parametrize("seed", range(20))
def test_an_image_comes_twice_in_a_batch_only_if_its_class_is_too_small(mode, seed):
    labels = long_tailed(seed)
    sizes = labels.bincount()
    for batch in epoch_batches(labels, 40, mode=mode, min_per_class=4, generator=generator(seed)):
        for label, held in classes_of(batch, labels).items():
            times = Counter(batch[labels[batch] == label].tolist())
            assert len(times) == min(held, sizes[label])
            assert max(times.values()) == -(-held // int(sizes[label]))  # repeats are spread evenly


@pytest.mark.parametrize("seed", range(3))
def test_sd198_batches_hold_10_images_of_each_of_9_classes(seed):
    sizes = torch.randint(9, 61, (198,), generator=generator(seed)).tolist()
    labels = shuffled(sizes, seed)
    batches = epoch_batches(labels, 90, mode="balanced", classes_per_batch=9, generator=generator(seed))
    seen = Counter()
    for batch in batches:
        held = classes_of(batch, labels)
        assert len(held) == 9 and set(held.values()) == {10}
        assert all(len(set(batch[labels[batch] == c].tolist())) == min(10, sizes[c]) for c in held)
        seen.update(held.keys())
    assert len(seen) == 198 and max(seen.values()) - min(seen.values()) <= 1  # classes take turns
    assert len(batches) == -(-len(labels) // 90)


def test_small_sets_have_batches_enough_for_every_class():
    labels = torch.arange(50)
    batches = epoch_batches(labels, 18, classes_per_batch=3, generator=generator())
    assert len(batches) == 17 and torch.equal(torch.cat(batches).unique(), labels)


@pytest.mark.parametrize("seed", range(10))
def test_balanced_is_equal_within_one(seed):
    labels = long_tailed(seed)
    for batch in epoch_batches(labels, 97, mode="balanced", min_per_class=3, generator=generator(seed)):
        held = classes_of(batch, labels).values()
        assert max(held) - min(held) <= 1


def test_proportional_is_exact_where_the_floor_does_not_matter():
    labels = shuffled([100, 200, 300])
    for batch in epoch_batches(labels, 60, min_per_class=1, generator=generator()):
        assert classes_of(batch, labels) == {0: 10, 1: 20, 2: 30}


def above_the_floor(counts, batch_size, floor):
    """Shares of a batch in proportion to the counts, but at least the floor; not rounded."""
    at_floor = set()
    while True:
        left = batch_size - floor * len(at_floor)
        total = sum(n for c, n in enumerate(counts) if c not in at_floor)
        shares = [floor if c in at_floor else left * n / total for c, n in enumerate(counts)]
        below = {c for c, share in enumerate(shares) if share < floor}
        if not below:
            return shares
        at_floor |= below


@pytest.mark.parametrize("batch_size, floor", [(96, 6), (64, 6), (96, 2), (48, 6)])
def test_proportional_follows_the_proportions_of_skin7_above_the_floor(batch_size, floor):
    labels = shuffled(SKIN7)
    shares = above_the_floor(SKIN7, batch_size, floor)
    for batch in epoch_batches(labels, batch_size, min_per_class=floor, generator=generator())[:3]:
        held = classes_of(batch, labels)
        assert all(abs(held[c] - share) < 1 for c, share in enumerate(shares)), (held, shares)


def test_skin7_batch_by_hand():
    """72 of 96 images are left for the three classes above 6: 72 / 8917 of each."""
    labels = shuffled(SKIN7)
    batch = epoch_batches(labels, 96, generator=generator())[0]
    assert classes_of(batch, labels) == {0: 54, 1: 9, 2: 9, 3: 6, 4: 6, 5: 6, 6: 6}


@pytest.mark.parametrize("mode", ["proportional", "balanced", "random"])
def test_the_generator_is_the_only_chance(mode):
    labels = long_tailed(3)
    state = torch.get_rng_state()
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed + len(draws))
        before = torch.get_rng_state()
        batches = epoch_batches(labels, 40, mode=mode, min_per_class=3, generator=generator(seed))
        draws.append(torch.cat(batches))
        assert torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(state)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("mode", ["proportional", "balanced", "random"])
@pytest.mark.parametrize("seed", [1, 2])
def test_over_many_epochs_every_image_comes_up(mode, seed):
    labels = long_tailed(seed)
    chance = generator(seed)
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for _ in range(100):
        for batch in epoch_batches(labels, 40, mode=mode, min_per_class=3, generator=chance):
            seen += batch.bincount(minlength=len(labels))
    assert seen.min() > 0


@stratified
def test_images_of_a_class_take_turns_within_an_epoch(mode):
    labels = shuffled([150, 60, 30, 7])
    times = torch.cat(epoch_batches(labels, 40, mode=mode, min_per_class=5, generator=generator())).bincount(
        minlength=len(labels)
    )
    for label in range(4):
        assert times[labels == label].max() - times[labels == label].min() <= 1


def test_images_and_batches_are_shuffled():
    """No image and no class is tied to a place: the first batch differs from epoch to epoch."""
    labels = torch.arange(20).repeat_interleave(30)
    chance = generator()
    first = [epoch_batches(labels, 24, mode="balanced", generator=chance)[0] for _ in range(40)]
    assert torch.equal(labels[torch.cat(first)].unique(), torch.arange(20))
    assert len(torch.cat(first).unique()) > 400  # of 600 images in 960 draws: about 480


def test_random_is_a_plain_shuffle():
    labels = shuffled([90, 10])
    batches = epoch_batches(labels, 32, mode="random", generator=generator())
    assert [len(batch) for batch in batches] == [32, 32, 32, 4]
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(100))
    assert not torch.equal(torch.cat(batches), torch.arange(100))


def test_labels_need_not_be_consecutive_and_one_class_is_enough():
    labels = torch.tensor([7, 7, 7, -2, -2, 500])
    batch = epoch_batches(labels, 9, mode="balanced", min_per_class=3, generator=generator())[0]
    assert classes_of(batch, labels) == {7: 3, -2: 3, 500: 3}
    assert len(epoch_batches(torch.zeros(5).long(), 6, generator=generator())[0]) == 6


@pytest.mark.parametrize(
    "labels, batch_size, options, told",
    [
        ([0, 1], 12, {"mode": "stratified"}, "unknown sampling mode 'stratified'"),
        ([], 12, {}, "no images"),
        ([0, 1], 0, {}, "at least 1"),
        ([0, 1], 12, {"min_per_class": 0}, "at least 1"),
        ([0, 1], 11, {}, "cannot hold 2 classes with 6"),
        ([0, 1, 2], 17, {"classes_per_batch": 3}, "cannot hold 3 classes with 6"),
        ([0, 1, 2], 18, {"classes_per_batch": 1}, "cannot hold 2 classes"),
        ([0, 1, 2], 18, {"classes_per_batch": 0}, "cannot hold 2 classes"),
        ([0, 0], 5, {}, "cannot hold"),
    ],
)
def test_impossible_batches_are_refused(labels, batch_size, options, told):
    with pytest.raises(ValueError, match=told):
        epoch_batches(torch.tensor(labels, dtype=torch.int64), batch_size, **options, generator=generator())
