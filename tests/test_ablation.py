import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from probes.ablation import HeadAblation, matters
from probes.probe import Probe, ProbeBatch
from tests.views import PlainBatch, SumView

B, N, R = 8, 4, 3
SIGNS = torch.from_numpy(hadamard(B)[1:]).float()  # signals over examples: mean 0, orthogonal, mean square 1
FIRST = (torch.arange(N) < 2).expand(B, N)


def signal(k, *shares):
    """Signal k, worth these shares of the loss on the tokens (given one: on all)."""
    return SIGNS[k][:, None] * torch.tensor(shares).sqrt().expand(N)


def stack(layers):
    return torch.stack([torch.stack(layer) for layer in layers])[None]


def measure(says, uniform=None, noise=0.0, groups=None, mask=None, offset=0.0, ceilings=None, **view):
    """Columns `[L, H, G]` of a model whose targets are what its heads say, plus noise that nobody says."""
    says = stack(says)
    uniform = torch.zeros_like(says) if uniform is None else stack(uniform)
    view = SumView(says + offset, uniform + offset, **view)
    batch = PlainBatch(inputs=torch.zeros(B, N, 1), mask=mask)
    targets = view.predict(batch)[0] + signal(6, noise)[..., None]
    batch = PlainBatch(inputs=batch.inputs, targets=targets, mask=mask)
    view.calls.clear()
    replicate = ProbeBatch(batch=batch, relations={}, groups=groups or {}, ceilings=ceilings or {})
    found = HeadAblation((replicate,) * R).measure(view)
    assert found.relations == ("all", *(groups or {}))
    for values in found.values.values():
        assert values.shape == (1, *says.shape[1:3], len(found.relations), R)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values[..., 1:], values[..., :1].repeat(R - 1, -1))
    return {column: values[0, ..., 0] for column, values in found.values.items()}, view


def near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 3.0])  # a mean is kept, so worth nothing
def test_heads_that_add_up(offset):
    silent = torch.zeros(B, N)
    found, _ = measure([[signal(0, 0.7), signal(1, 0.1), silent], [signal(2, 0.2), silent, silent]], noise=0.5,
                       offset=offset)  # fmt: skip
    for column in ("ablation", "pattern", "only"):
        near(found[column][..., 0], [[0.7, 0.1, 0], [0.2, 0, 0]])
    near(found["whole_layer"][..., 0], [[0.8] * 3, [0.2] * 3])
    near(found["redundancy"], 0)
    near(found["loss"], 0.5)
    near(found["loss_without_attention"], 1.5)


def test_shares_are_of_what_attention_is_worth_not_of_the_loss():
    found, _ = measure([[signal(0, 1.4), signal(1, 0.6)]], noise=9.0)
    near(found["ablation"][..., 0], [[0.7, 0.3]])


def test_losing_all_heads_counts_for_no_more_than_the_ceiling():
    found, _ = measure([[signal(0, 1.4), signal(1, 0.6)]], noise=0.5, ceilings={"all": 1.5})
    near(found["loss_without_attention"], 1.5)
    near(found["ablation"][..., 0], [[1.4, 0.6]])


def test_copies_hide_each_other():
    half = signal(0, 0.25)  # amplitude 1/2 each: alone they miss (1/2)^2, together 1
    found, _ = measure([[half, half]])
    near(found["ablation"], 0.25)
    near(found["only"], 0.75)
    near(found["whole_layer"], 1)
    near(found["redundancy"], 0.5)


def test_full_copies_are_worth_nothing_one_by_one():
    found, _ = measure([[signal(0, 1.0), signal(0, 1.0), torch.zeros(B, N)]], saturate=1.0)
    near(found["ablation"], 0)
    near(found["only"][0, :, 0], [1, 1, 0])
    near(found["redundancy"], 1)


def test_a_head_that_never_looked_is_worth_its_values_only():
    looks, sums = signal(0, 0.6), signal(1, 0.4)
    found, _ = measure([[looks, sums]], uniform=[[torch.zeros(B, N), sums]])
    near(found["ablation"][..., 0], [[0.6, 0.4]])
    near(found["pattern"][..., 0], [[0.6, 0]])


def test_groups_of_tokens_have_their_own_shares():
    heads = [signal(0, 0.9, 0.9, 0.1, 0.1), signal(1, 0.1, 0.1, 0.3, 0.3)]
    found, view = measure([heads], groups={"first": FIRST, "last": ~FIRST, "nobody": FIRST & ~FIRST})
    near(found["ablation"][0, :, :3], [[0.5 / 0.7, 0.9, 0.25], [0.2 / 0.7, 0.1, 0.75]])
    near(found["loss_without_attention"][0, 0, :3], [0.7, 1, 0.4])
    assert all(np.isnan(values[..., 3]).all() for values in found.values())
    assert len(view.calls) == 2 + 3 * 2 + 1  # each prediction once, however many groups and replicates


def test_groups_that_split_the_real_tokens_average_to_all():
    mask = torch.arange(N) < torch.tensor([4, 2, 3, 1, 4, 2, 3, 1])[:, None]
    noise = torch.randn(2, B, N, generator=torch.Generator().manual_seed(0))
    found, _ = measure([[noise[0], noise[1]]], mask=mask, noise=0.3, groups={"first": FIRST, "last": ~FIRST})
    share = ((FIRST & mask).sum(-1) / mask.sum(-1)).mean().item()
    for column in ("loss", "loss_without_attention"):
        near(found[column][..., 0], share * found[column][..., 1] + (1 - share) * found[column][..., 2])


def test_attention_worth_nothing_has_no_shares():
    found, _ = measure([[signal(0, 5e-4), signal(1, 4e-4)]], noise=1.0)
    assert all(np.isnan(found[c]).all() for c in ("ablation", "pattern", "only", "whole_layer", "redundancy"))
    near(found["loss"], 1)


def test_predictions_come_layer_by_layer_and_no_more_than_needed():
    _, view = measure([[signal(k, 0.5) for k in range(3)], [signal(k, 0.5) for k in range(3, 6)]])
    assert len(view.calls) == 2 + 2 * (3 * 3 + 1)
    layers = [call[0].layer for call in view.calls if len(call) == 1]
    assert layers == sorted(layers)


def test_one_head_alone_is_its_layer():
    found, _ = measure([[signal(0, 0.6)], [signal(1, 0.4)]])
    for column in ("ablation", "only", "whole_layer"):
        near(found[column][:, 0, 0], [0.6, 0.4])


def test_members_do_not_depend_on_their_company_to_the_bit():
    g = torch.Generator().manual_seed(1)
    says, uniform = torch.randn(2, 5, 2, 2, 61, 7, generator=g)
    batch = PlainBatch(inputs=torch.zeros(61, 7, 1), targets=torch.randn(61, 7, 1, generator=g))
    probe = HeadAblation((ProbeBatch(batch=batch, relations={}),) * 2)
    together = probe.measure(SumView(says, uniform)).values
    alone = probe.measure(SumView(says[3:4], uniform[3:4])).values
    assert all(np.array_equal(v[3:4], alone[column], equal_nan=True) for column, v in together.items())


def test_matters_is_a_one_sided_t_bound():
    spread = np.array([-1.0, 1, -1, 1, -1, 1, -1, 1])  # t(0.95, 7) sqrt(8/7) / sqrt(8) = 1.8946 / sqrt(7) = 0.7161
    assert matters(0.01 + 0.7162 + spread)
    assert not matters(0.01 + 0.7160 + spread)
    assert matters(0.01 + 0.7160 + spread, confidence=0.9)
    np.testing.assert_array_equal(matters(np.array([[0.02, 0.02], [0.02, np.nan], [0.0, 0.0]])), [True, False, False])
    with pytest.raises(ValueError, match="at least 2"):
        matters(np.ones(1))


def test_errors_name_the_field_and_it_is_a_probe():
    batch = PlainBatch(inputs=torch.zeros(B, N, 1))
    with pytest.raises(ValueError, match=r"replicates\[0\].groups: got \['all'\]"):
        HeadAblation((ProbeBatch(batch=batch, relations={}, groups={"all": FIRST}),))
    with pytest.raises(ValueError, match="replicates: got none"):
        HeadAblation(())
    probe: Probe = HeadAblation((ProbeBatch(batch=batch, relations={}),))
    assert (probe.name, probe.when) == ("ablation", "sparse")
