from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.attention import AttentionScores, lift
from probes.distance import DistanceCorrelation, shell_edges
from probes.probe import Probe, ProbeBatch
from tests.views import PlantedView, plain_batch

B, N, R = 6, 8, 3
EYE = torch.eye(N, dtype=torch.bool)


def cliques(size):
    """Tokens in groups of `size`, all partners of each other."""
    group = torch.arange(N) // size
    return ((group[:, None] == group) & ~EYE).expand(B, N, N)


def probe_set(relations, distance=None, **fields):
    return tuple(
        ProbeBatch(batch=plain_batch(B, N, **fields), relations=relations, distance=distance) for _ in range(R)
    )


def planted(replicates, *heads):
    """One member, one layer; the same attention `[B, N, K]` of each head in every replicate."""
    return PlantedView(replicates, [torch.stack([h.float() for h in heads])[None, None]] * len(replicates))


def scores(relations, *heads, **fields):
    """Columns `[H, Q]`, after checking that equal replicates score equally."""
    replicates = probe_set(relations, **fields)
    values = AttentionScores(replicates).measure(planted(replicates, *heads)).values
    assert all(v.shape == (1, 1, len(heads), len(relations), R) and v.dtype == np.float32 for v in values.values())
    return {name: v[0, 0, :, :, 0] for name, v in values.items()}


def random_set(seed, k=None, b=4, n=7):
    """Replicates with padding, hidden keys, and (given k) local keys; attention `[2, 1, 2, B, N, K]` to match."""
    g = torch.Generator().manual_seed(seed)
    replicates, attention = [], []
    for _ in range(2):
        keys = None if k is None else torch.rand(b, n, n, generator=g).argsort(-1)[..., :k]
        index = torch.arange(n).expand(b, n, n) if keys is None else keys
        mask = torch.arange(n) < torch.randint(3, n + 1, (b, 1), generator=g)
        allowed = torch.rand(index.shape, generator=g) < 0.8
        own = index == torch.arange(n)[:, None]
        relations = {name: (torch.rand(index.shape, generator=g) < p) & ~own for name, p in (("a", 0.3), ("b", 0.1))}
        batch = plain_batch(b, n, mask=mask, keys=keys, allowed=allowed)
        replicates.append(ProbeBatch(batch=batch, relations=relations, distance=torch.rand(index.shape, generator=g)))
        seen = allowed & mask[:, None].expand(b, n, n).gather(2, index)
        logits = torch.randn(2, 1, 2, *index.shape, generator=g).masked_fill(~seen, -torch.inf)
        attention.append(logits.softmax(-1))  # NaN where a query sees nothing
    return tuple(replicates), attention


def slow_scores(replicate, name, attention):
    """The definitions of section 5, spelt out over tokens: one head `[B, N, K]`, one relation."""
    batch, related = replicate.batch, replicate.relations[name]
    found = {column: [] for column in AttentionScores.columns}
    for b in range(len(attention)):
        real = [i for i in range(attention.shape[1]) if batch.mask[b, i]]
        key = (lambda i, k: k) if batch.keys is None else (lambda i, k, b=b: int(batch.keys[b, i, k]))
        sees = {i: {key(i, k): k for k in range(attention.shape[2]) if batch.allowed[b, i, k]} for i in real}
        sees = {i: {j: k for j, k in row.items() if j in real} for i, row in sees.items()}
        rows = {i: {j: float(attention[b, i, k]) for j, k in row.items()} for i, row in sees.items()}
        for i in real:
            partners = [j for j, k in sees[i].items() if related[b, i, k]]
            score = sum(rows[i][j] for j in partners)
            found["score_all"].append(score)
            found["self"].append(rows[i].get(i, 0.0))
            if len(sees[i]) > 1:
                found["entropy"].append(-sum(a * np.log(a) for a in rows[i].values()) / np.log(len(sees[i])))
            if partners:
                found["score"].append(score)
                found["null_uniform"].append(len(partners) / len(sees[i]))
                others = {j: [rows[o][j] for o in real if o != i and j in rows[o]] or [0.0] for j in partners}
                found["null_rows"].append(sum(np.mean(given) for given in others.values()))
    return {column: np.mean(values) for column, values in found.items()}


@pytest.mark.parametrize("k", [None, 4])
def test_fast_scores_equal_the_definitions_spelt_out(k):
    replicates, attention = random_set(0, k)
    values = AttentionScores(replicates).measure(PlantedView(replicates, attention)).values
    for r, replicate in enumerate(replicates):
        for q, name in enumerate(("a", "b")):
            for s, h in ((0, 0), (1, 1)):
                for column, expected in slow_scores(replicate, name, attention[r][s, 0, h]).items():
                    assert values[column][s, 0, h, q, r] == pytest.approx(expected, rel=1e-5), column


def test_uniform_attention_has_lift_one_by_both_nulls():
    found = scores({"pair": cliques(2), "four": cliques(4)}, torch.full((B, N, N), 1 / N))
    np.testing.assert_allclose(found["score"], [[1 / N, 3 / N]], rtol=1e-6)
    np.testing.assert_allclose(lift(found["score"], found["null_uniform"]), 1, rtol=1e-6)
    np.testing.assert_allclose(lift(found["score"], found["null_rows"]), 1, rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], 1, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_perfect_detector(size):
    partner = cliques(size)
    found = scores({"m": partner}, partner / (size - 1))
    np.testing.assert_allclose(found["score"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["null_uniform"], (size - 1) / N, rtol=1e-6)
    np.testing.assert_allclose(found["null_rows"], (size - 2) / (N - 1), rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], np.log(size - 1) / np.log(N), atol=1e-6)


def test_a_head_that_looks_at_itself():
    found = scores({"m": cliques(4)}, EYE.expand(B, N, N))
    assert (found["score"], found["self"], found["entropy"]) == (0, 1, 0)
    np.testing.assert_allclose(found["null_rows"], 3 / (N - 1), rtol=1e-6)


def test_looking_at_the_most_crowded_is_no_detection():
    star = torch.zeros(N, N, dtype=torch.bool)
    star[0, 1:6] = star[1:6, 0] = True  # token 0 is a partner of 1..5; 6 and 7 have none
    found = scores({"m": star.expand(B, N, N)}, (torch.arange(N) == 0).expand(B, N, N))
    np.testing.assert_allclose(found["score"], 5 / 6, rtol=1e-6)
    np.testing.assert_allclose(found["score_all"], 5 / 8, rtol=1e-6)
    assert lift(found["score"], found["null_uniform"]) > 2
    np.testing.assert_allclose(lift(found["score"], found["null_rows"]), 1, rtol=1e-6)


@pytest.mark.parametrize("k", [None, 4])
def test_null_rows_is_the_mean_of_real_exchanges(k):
    replicates, attention = random_set(1, k)
    replicate, rows = replicates[0], torch.nan_to_num(attention[0][0, 0, 0])
    b, n, _ = rows.shape
    mask, index = replicate.batch.mask, torch.arange(n).expand(b, n, n) if k is None else replicate.batch.keys
    seen = replicate.batch.allowed & mask[:, None].expand(b, n, n).gather(2, index) & mask[..., None]
    partner = replicate.relations["a"] & seen
    dense = torch.zeros(b, n, n).scatter(2, index, rows * seen)  # attention by token
    sees = torch.zeros(b, n, n).scatter(2, index, seen.float())  # [b, query, token]
    asks = torch.zeros(b, n, n).scatter(2, index, partner.float()).bool()
    other = sees.transpose(1, 2)[:, None] * (1 - torch.eye(n))[:, None]  # [b, i, j, i']: may i' lend i what it gives j
    lent = other[asks]
    token = asks.nonzero()
    draws = torch.multinomial(lent + 1e-9, 4000, replacement=True, generator=torch.Generator().manual_seed(2))
    given = dense[token[:, :1], draws, token[:, 2:]] * (lent.sum(-1, keepdim=True) > 0)
    sums = torch.zeros(b, n, 4000).index_put((token[:, 0], token[:, 1]), given, accumulate=True)
    sampled = sums[partner.any(-1)].mean(0)
    expected = AttentionScores(replicates).measure(PlantedView(replicates, attention)).values["null_rows"]
    error = sampled.std() / len(sampled) ** 0.5
    assert abs(sampled.mean() - expected[0, 0, 0, 0, 0]) < 4 * error


def test_uniform_attention_over_nearest_keys_has_lift_one_by_both_nulls():
    gap = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    keys = torch.minimum(gap, N - gap).argsort(dim=-1, stable=True)[:, :3].expand(B, N, 3)  # itself and two neighbours
    related = keys != torch.arange(N)[:, None]
    replicates = (ProbeBatch(batch=plain_batch(B, N, keys=keys), relations={"m": related}),)
    found = AttentionScores(replicates).measure(PlantedView(replicates, [torch.full((1, 1, 1, B, N, 3), 1 / 3)])).values
    for null in ("null_uniform", "null_rows"):
        np.testing.assert_allclose(lift(found["score"], found[null]), 1, rtol=1e-6)


@pytest.mark.parametrize("probe", [AttentionScores, lambda r: DistanceCorrelation(r, shell_edges(r, 5))])
class TestWhatMayNotMatter:
    def same(self, probe, first, second, exact=False):
        one, two = (
            probe(replicates).measure(PlantedView(replicates, attention)) for replicates, attention in (first, second)
        )
        for column, values in one.values.items():
            np.testing.assert_allclose(two.values[column], values, rtol=0 if exact else 1e-4, atol=1e-6 * (not exact))

    def changed(self, replicates, pair, token):
        """Every pair value `[..., N, N]` and token value `[..., N]` of a probe set (without keys) changed."""
        return tuple(
            ProbeBatch(
                batch=plain_batch(r.batch.mask.shape[0], token(r.batch.mask).shape[-1], mask=token(r.batch.mask),
                                  allowed=pair(r.batch.allowed)),
                relations={name: pair(m) for name, m in r.relations.items()}, distance=pair(r.distance),
            ) for r in replicates
        )  # fmt: skip

    def test_the_order_of_tokens(self, probe):
        replicates, attention = random_set(3)
        p = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        pair, token = (lambda x: x[..., p, :][..., p]), (lambda x: x[..., p])
        self.same(probe, (replicates, attention), (self.changed(replicates, pair, token), [pair(a) for a in attention]))

    def test_padding(self, probe):
        replicates, attention = random_set(4)
        grow = torch.nn.functional.pad
        longer = self.changed(replicates, lambda x: grow(x, (0, 2, 0, 2), value=1), lambda x: grow(x, (0, 2)))
        nan = [grow(grow(a, (0, 2)), (0, 0, 0, 2), value=torch.nan) for a in attention]
        self.same(probe, (replicates, attention), (longer, nan))

    def test_keys_spelt_out(self, probe):
        replicates, attention = random_set(5)
        everything = torch.arange(7).expand(4, 7, 7)
        spelt = tuple(replace(r, batch=replace(r.batch, keys=everything)) for r in replicates)
        self.same(probe, (replicates, attention), (spelt, attention), exact=True)

    def test_the_order_of_keys(self, probe):
        replicates, attention = random_set(6)
        p = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        shuffled = tuple(
            replace(r, batch=replace(r.batch, keys=p.expand(4, 7, 7), allowed=r.batch.allowed[..., p]),
                    relations={name: m[..., p] for name, m in r.relations.items()}, distance=r.distance[..., p])
            for r in replicates
        )  # fmt: skip
        self.same(probe, (replicates, attention), (shuffled, [a[..., p] for a in attention]))

    @pytest.mark.parametrize("k", [None, 3])
    def test_the_company_of_a_member_to_the_bit(self, probe, k):
        replicates, attention = random_set(7, k, b=5)
        pack = [a.repeat(3, 1, 1, 1, 1, 1) for a in attention]
        together = probe(replicates).measure(PlantedView(replicates, pack)).values
        alone = probe(replicates).measure(PlantedView(replicates, [a[1:].clone() for a in attention])).values
        assert all(np.array_equal(v[5:], alone[column], equal_nan=True) for column, v in together.items())


def test_a_diverged_member_spoils_no_other():
    replicates, attention = random_set(8)
    for a in attention:
        a[0] = torch.nan
    values = AttentionScores(replicates).measure(PlantedView(replicates, attention)).values
    assert np.isnan(values["score"][0]).all()
    assert all(np.isfinite(v[1]).all() for v in values.values())


def test_a_relation_that_never_holds_is_undefined_but_for_all_queries():
    found = scores({"never": torch.zeros(B, N, N, dtype=torch.bool)}, torch.full((B, N, N), 1 / N))
    assert all(np.isnan(found[column]) for column in ("score", "null_uniform", "null_rows"))
    assert found["score_all"] == 0
    assert np.isnan(lift(found["score"], found["null_uniform"]))


def test_lift_is_a_ratio_of_means_over_defined_replicates():
    ratio = lift(np.array([[1, 3, np.nan], [1, 1, 1]], np.float32), np.array([[1, 1, 5], [0, 0, 0]], np.float32))
    np.testing.assert_array_equal(ratio, [2, np.nan])


def on_a_ring():
    """Distances between 8 tokens on a ring: 0 to 4, every token with the same set of distances."""
    gap = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    return torch.minimum(gap, N - gap).double().expand(B, N, N)


def test_distance_of_known_heads():
    r = on_a_ring()
    near, far, uniform, itself = (-r).softmax(-1), r.softmax(-1), torch.full((B, N, N), 1 / N), EYE.expand(B, N, N)
    replicates = probe_set({"m": cliques(2)}, distance=r)
    probe = DistanceCorrelation(replicates, (0.0, 1.5, 2.5, 3.5, 4.5))
    found = probe.measure(planted(replicates, near, far, uniform, itself))
    values = {column: v[0, 0, :, :, 0].T for column, v in found.values.items()}  # [shell, head]
    assert found.relations == ("0.75", "2", "3", "4")
    pairs = ~EYE.expand(B, N, N)
    expected = [np.corrcoef(a[pairs].numpy(), r[pairs].numpy())[0, 1] for a in (near, far)]
    np.testing.assert_allclose(values["corr"], [[*expected, np.nan, np.nan]] * 4, rtol=1e-5)
    assert values["corr"][0, 0] < -0.5 < 0.5 < values["corr"][0, 1]
    connected, ratio = values["G"], values["g"]
    np.testing.assert_allclose(connected.sum(0), 0, atol=1e-7)
    weights = np.exp(-np.arange(1.0, 5.0))  # a shell holds one distance: 1, 2, 3 (two tokens each), 4 (one)
    np.testing.assert_allclose(ratio[:, 0], weights * 7 / (weights @ [2, 2, 2, 1]), rtol=1e-5)
    apart = near[pairs].mean().item() * np.array([2, 2, 2, 1]) / 7
    np.testing.assert_allclose(connected[:, 0], (ratio[:, 0] - 1) * apart, rtol=1e-4)
    np.testing.assert_allclose(ratio[:, 2], 1, rtol=1e-6)
    assert np.isnan(ratio[:, 3]).all()


def test_shells_are_equally_wide_and_hold_most_pairs():
    replicates = probe_set({"m": cliques(2)}, distance=on_a_ring())
    edges = shell_edges(replicates, 12)
    np.testing.assert_allclose(edges, 0.34 * np.arange(13), rtol=1e-9)  # 90th percentile 4: 4 / 12, rounded up
    assert len(DistanceCorrelation(replicates, edges).relations) == 12


def test_errors_name_the_field():
    replicates = probe_set({"m": cliques(2)})
    other = replace(replicates[0], relations={"else": cliques(2)})
    with pytest.raises(ValueError, match=r"replicates\[1\].relations: got \['else'\].*\['m'\]"):
        AttentionScores((replicates[0], other))
    for empty in (AttentionScores, lambda r: DistanceCorrelation(r, (0.0, 1.0))):
        with pytest.raises(ValueError, match="replicates: got none"):
            empty(())
    with pytest.raises(ValueError, match="distance=None"):
        DistanceCorrelation(replicates, (0.0, 1.0))
    with pytest.raises(ValueError, match="edges"):
        DistanceCorrelation(replicates, (1.0, 1.0))


def test_they_are_probes():
    replicates = probe_set({"m": cliques(2)}, distance=on_a_ring())
    probes: list[Probe] = [AttentionScores(replicates), DistanceCorrelation(replicates, (0.0, 1.0))]
    assert [(p.name, p.when) for p in probes] == [("attention", "every"), ("distance", "sparse")]
    view = planted(replicates, torch.full((B, N, N), 1 / N))
    assert all(tuple(p.measure(view).values) == p.columns for p in probes)
