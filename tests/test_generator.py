import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from sim.generator import Generator, key_of

MANY = 200_000
LEAST = 1e-4  # streams are fixed, so a test passes for ever or never; p below this would be no accident


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def generator():
    return Generator.of("test", 0)


def correlation(one, other):
    return float(torch.corrcoef(torch.stack((one.flatten(), other.flatten())).double())[0, 1])


def test_uniform_fills_its_cells_evenly(generator, dtype):
    counts = torch.histc(generator.uniform(MANY, dtype=dtype), 256, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > LEAST
    assert stats.kstest(generator.uniform(MANY, dtype=dtype).numpy(), "uniform").pvalue > LEAST


def test_neighbouring_numbers_fill_the_plane_evenly(generator):
    pairs = generator.uniform(MANY, 2).numpy()
    counts, *_ = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=32, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > LEAST


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_every_bit_is_fair(generator, bit):
    ones = int(((generator.bits(MANY) >> bit) & 1).sum())
    assert stats.binomtest(ones, MANY).pvalue > LEAST


def test_uniform_never_reaches_its_ends(dtype):
    """Also for the smallest and largest integers that can come out of the shift."""
    values = Generator.stack(range(64)).uniform(20_000, dtype=dtype)
    assert values.min() > 0 and values.max() < 1
    digits = 52 if dtype == torch.float64 else 23
    ends = (torch.tensor([0, 2**digits - 1]).to(dtype) + 0.5) * 2.0**-digits
    assert ends[0] > 0 and ends[1] < 1


def test_uniform_resolution(generator):
    """Odd multiples of 2^-24 in float32; float64 uses bits far below that."""
    single = generator.uniform(1000).double() * 2**24
    assert torch.equal(single, single.round()) and (single % 2 == 1).all()
    double = generator.uniform(1000, dtype=torch.float64)
    fine = double * 2**40
    assert (fine != fine.round()).float().mean() > 0.99
    torch.testing.assert_close(generator.uniform(1000).double(), double, rtol=0, atol=2.0**-22)


def test_normal_moments_and_distribution(generator, dtype):
    x = generator.normal(MANY, dtype=dtype).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < 5 * (variance / MANY) ** 0.5
    assert stats.kstest(x.numpy(), "norm").pvalue > LEAST
    assert 4 < float(x.abs().max()) < 7


def test_neighbours_are_uncorrelated(generator):
    """Neighbouring keys, steps, labels and positions."""
    size = 50_000
    limit = 5 / size**0.5
    keys = Generator.stack([10, 11, 12]).normal(size)
    steps = torch.stack([generator.fold(step).normal(size) for step in (0, 1, 2)])
    labels = torch.stack([generator.fold(label).normal(size) for label in ("a", "b", "noise")])
    for streams in (keys, steps, labels):
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert abs(correlation(streams[one], streams[other])) < limit
            assert abs(correlation(streams[one][1:], streams[other][:-1])) < limit
    x = generator.normal(size)
    for lag in (1, 2, 16):
        assert abs(correlation(x[lag:], x[:-lag])) < limit
        assert abs(correlation(x[lag:] ** 2, x[:-lag] ** 2)) < limit


def test_first_numbers_of_neighbouring_streams_are_uniform():
    """Across members, and across steps of one member: what a sweep really uses."""
    members = Generator.stack(range(20_000))
    steps = Generator.of("one").fold(torch.arange(20_000))
    for streams in (members, members.fold("noise").fold(3), steps, steps.fold("noise")):
        assert stats.kstest(streams.uniform(1).flatten().numpy(), "uniform").pvalue > LEAST


@pytest.mark.parametrize("high", [1, 2, 7, 1000, (1 << 31) - 1])
def test_integers_range(generator, high):
    drawn = generator.integers(high, 50_000)
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < high
    if high <= 1000:
        counts = torch.bincount(drawn, minlength=high).numpy()
        assert (counts > 0).all() and (high == 1 or stats.chisquare(counts).pvalue > LEAST)


@pytest.mark.parametrize("high", [0, -1, 1 << 31])
def test_integers_refuses_what_it_cannot_draw(generator, high):
    with pytest.raises(ValueError, match="high"):
        generator.integers(high, 2)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (17,), (5, 7), (1001, 3)])
def test_stacked_equals_single(shape, dtype):
    keys = [0, 1, -1, 2**62]
    together = Generator.stack(keys).fold("x").fold(4)
    for member, key in enumerate(keys):
        alone = Generator.stack([key]).fold("x").fold(4)
        for name in ("uniform", "normal"):
            drawn = getattr(together, name)(*shape, dtype=dtype)
            assert drawn.shape == (4, *shape) and drawn.dtype == dtype
            assert torch.equal(drawn[member], getattr(alone, name)(*shape, dtype=dtype)[0])
        assert torch.equal(together.integers(9, *shape)[member], alone.integers(9, *shape)[0])


def test_one_step_per_member(generator):
    """A tensor of steps folds each stream by its own."""
    streams = Generator.stack([1, 2, 3])
    folded = streams.fold(torch.tensor([7, 8, 9]))
    assert [int(key) for key in folded.key] == [int(streams.fold(step).key[i]) for i, step in enumerate((7, 8, 9))]


def test_draws_advance_nothing(generator):
    assert torch.equal(generator.normal(5), generator.normal(5))
    assert torch.equal(generator.uniform(9)[:5], generator.uniform(5))


def test_permutation(generator):
    streams = Generator.stack(range(2000))
    orders = streams.permutation(5)
    assert torch.equal(orders.sort(-1).values, torch.arange(5).expand(2000, 5))
    table = torch.zeros(5, 5).index_put_((torch.arange(5).expand(2000, 5), orders), torch.ones(()), accumulate=True)
    assert stats.chisquare(table.flatten().numpy()).pvalue > LEAST
    assert torch.equal(generator.permutation(1), torch.tensor([0]))


def test_folds_differ(generator):
    folded = [generator, *(generator.fold(label) for label in ("a", "b", "", 0, 1, -1, 2**62))]
    folded += [generator.fold("a").fold("b"), generator.fold("b").fold("a"), generator.fold(0).fold(0)]
    assert len({int(stream.key) for stream in folded}) == len(folded)
    many = generator.fold(torch.arange(100_000)).key
    assert len(many.unique()) == 100_000


def test_keys_are_the_same_in_another_process(generator):
    """Python's own hash differs from process to process."""
    assert key_of("pool", 1) != key_of("pool", 2) and key_of("ab", "c") != key_of("a", "bc")
    code = "from sim.generator import key_of; print(key_of('pool', 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == key_of("pool", 1)


def test_labels_fold_alike_as_numbers_and_as_tensors():
    stream = Generator.stack([0, 1, -(1 << 63), (1 << 63) - 1])
    for label in (0, 1, -1, 12345, (1 << 63) - 1, -(1 << 63)):
        assert torch.equal(stream.fold(label).key, stream.fold(torch.tensor(label)).key)
