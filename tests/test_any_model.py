"""Probes measure models that headway did not make: here a stock `torch.nn.TransformerEncoder`."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probes.ablation import HeadAblation
from probes.attention import AttentionScores
from probes.distance import DistanceCorrelation
from probes.probe import ProbeBatch, Replace, View, join_batches
from tests.views import FakeView, PlainBatch

B, N, D, H, L, S = 8, 6, 16, 4, 2, 2


class EncoderView(FakeView):
    """Stock encoders (post-norm, no dropout) as a View: attention written out by head, the rest their own parts."""

    members, layers, heads = S, L, H

    def __init__(self, encoders: list[nn.TransformerEncoder]) -> None:
        self.encoders = encoders

    def attention(self, batch: PlainBatch) -> Tensor:
        return torch.stack([torch.stack(self._run(e, batch, ())[1]) for e in self.encoders])

    def predict(self, batch: PlainBatch, replace: tuple[Replace, ...] = ()) -> Tensor:
        return torch.stack([self._run(e, batch, replace)[0] for e in self.encoders])

    def _run(self, encoder, batch, replace):
        x, patterns = batch.inputs, []
        for index, layer in enumerate(encoder.layers):
            now = next((r for r in replace if r.layer == index), Replace(layer=index))
            pattern, said = self._heads(layer.self_attn, x, batch.mask, now)
            patterns.append(pattern)
            x = layer.norm1(x + said)
            x = layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))
        return x, patterns

    def _heads(self, attention, x, mask, now):
        q, k, v = (
            p.unflatten(-1, (H, -1)).transpose(1, 2)
            for p in nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        )
        logits = (q @ k.mT / (D // H) ** 0.5).transpose(0, 1)  # [H, B, N, N]
        logits[list(now.pattern)] = 0.0
        pattern = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        outward = attention.out_proj.weight.unflatten(1, (H, -1))  # [D, H, D / H]
        said = torch.einsum("hbij,bhjc,dhc->hbid", pattern, v, outward)
        for h in now.output:
            said[h] = said[h][mask].mean(0)
        return pattern, said.sum(0) + attention.out_proj.bias


def edited(encoder, layer, head, batch, what):
    """The encoder with one head changed by its weights alone: muted but for its mean, or blind."""
    encoder = copy.deepcopy(encoder)
    attention, own = encoder.layers[layer].self_attn, slice(head * D // H, (head + 1) * D // H)
    if what == "pattern":
        attention.in_proj_weight[own] = 0.0  # the query's rows
        attention.in_proj_bias[own] = 0.0
        return encoder
    x = batch.inputs
    for below in encoder.layers[:layer]:
        x = below(x, src_key_padding_mask=~batch.mask)
    weights = attention(x, x, x, key_padding_mask=~batch.mask, average_attn_weights=False)[1][:, head]
    values = x @ attention.in_proj_weight[2 * D :][own].T + attention.in_proj_bias[2 * D :][own]
    heard = (weights @ values)[batch.mask].mean(0)
    attention.out_proj.bias += attention.out_proj.weight[:, own] @ heard
    attention.out_proj.weight[:, own] = 0.0
    return encoder


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    encoders = []
    for _ in range(S):
        layer = nn.TransformerEncoderLayer(D, H, 32, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, L, enable_nested_tensor=False).eval().requires_grad_(False)
        for part in encoder.layers:
            part.self_attn.in_proj_weight.normal_()
            part.self_attn.out_proj.weight.normal_(std=0.3)
        encoders.append(encoder)
    replicates = []
    for _ in range(2):
        place = torch.rand(B, N, 2)
        distance = torch.cdist(place, place)
        mask = torch.arange(N) < torch.randint(4, N + 1, (B, 1))
        inputs = torch.cat([place, torch.randn(B, N, D - 2)], -1)
        targets = stock(encoders[0], inputs, mask) + 0.3 * torch.randn(B, N, D)
        near = (distance < 0.4) & ~torch.eye(N, dtype=torch.bool)
        replicates.append(ProbeBatch(batch=PlainBatch(inputs=inputs, targets=targets, mask=mask),
                                     relations={"near": near}, distance=distance,
                                     groups={"left": place[..., 0] < 0.5}))  # fmt: skip
    return encoders, tuple(replicates)


def stock(encoder, inputs, mask):
    return encoder(inputs, src_key_padding_mask=~mask)


def stock_attention(encoder, batch):
    """Attention `[L, B, H, N, N]` that `nn.MultiheadAttention` itself reports."""
    x, found = batch.inputs, []
    for layer in encoder.layers:
        found.append(layer.self_attn(x, x, x, key_padding_mask=~batch.mask, average_attn_weights=False)[1])
        x = layer(x, src_key_padding_mask=~batch.mask)
    return torch.stack(found)


def test_the_view_is_the_stock_model(measured):
    encoders, replicates = measured
    view: View = EncoderView(encoders)
    batch = replicates[0].batch
    for s, encoder in enumerate(encoders):
        theirs = stock(encoder, batch.inputs, batch.mask)
        torch.testing.assert_close(view.predict(batch)[s][batch.mask], theirs[batch.mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.attention(batch)[s].transpose(1, 2), stock_attention(encoder, batch))


def test_scores_and_distances(measured):
    encoders, replicates = measured
    view = EncoderView(encoders)
    scores = AttentionScores(replicates).measure(view).values
    distances = DistanceCorrelation(replicates, (0.0, 0.4, 2.0)).measure(view).values
    for r, replicate in enumerate(replicates):
        mask = replicate.batch.mask
        near = replicate.relations["near"] & mask[:, None] & mask[..., None]
        pairs = mask[:, None] & mask[..., None] & ~torch.eye(N, dtype=torch.bool)
        for s, encoder in enumerate(encoders):
            theirs = stock_attention(encoder, replicate.batch).transpose(1, 2)
            score = (theirs * near).sum(-1)[:, :, near.any(-1)].mean(-1)
            np.testing.assert_allclose(scores["score"][s, :, :, 0, r], score, rtol=1e-4)
            away = theirs[:, :, pairs].reshape(L * H, -1)
            corr = np.corrcoef(torch.cat([replicate.distance[pairs][None], away]))[0, 1:].reshape(L, H)
            np.testing.assert_allclose(distances["corr"][s, :, :, 0, r], corr, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["ablation", "pattern"])
def test_the_worth_of_heads_equals_that_of_edited_weights(measured, what):
    encoders, replicates = measured
    view = EncoderView(encoders)
    found = HeadAblation(replicates).measure(view)
    assert found.relations == ("all", "left")
    loss, without = found.values["loss"], found.values["loss_without_attention"]
    assert (without[0] > 1.1 * loss[0]).all()  # member 0 wrote the targets; member 1 may have no shares
    differences = (found.values[what] * (without - loss))[0, :, :, 0]
    everybody = join_batches([replicate.batch for replicate in replicates])  # over which an output's mean is taken
    for r, replicate in enumerate(replicates):
        for layer, head in np.ndindex(L, H):
            batch = replicate.batch
            theirs = stock(edited(encoders[0], layer, head, everybody, what), batch.inputs, batch.mask)
            expected = view.loss(theirs[None], batch).mean() - loss[0, 0, 0, 0, r]
            assert differences[layer, head, r] == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
            assert abs(expected) > 1e-4
