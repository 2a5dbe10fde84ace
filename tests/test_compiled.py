"""Training through compiled kernels: the eager path but for rounding, and bit for bit the same in any company."""

import dataclasses
import functools

import pytest
import torch

from sim.compiling import can_compile
from tests.test_step import DOUBLE, MASKED, NARROW, NOISED, TRAIN, assert_equal, state_after, trainer
from train import compiled

pytestmark = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")


def test_a_member_goes_the_eager_way_and_is_the_same_in_any_company_part_and_after_a_stop():
    """Two shapes only, as each takes a compiler 20 s: packs of one and of three."""
    train, keys = dataclasses.replace(TRAIN, compiled=True), (3, 7, 1)
    whole = state_after(8, MASKED, train, keys, NARROW)
    parts = state_after(8, MASKED, train, keys, NARROW, chunk=1)
    assert_equal(parts, whole)
    half = state_after(5, MASKED, train, keys, NARROW)
    assert_equal(state_after(8, MASKED, train, keys, NARROW, chunk=1, state=half), whole)
    assert_equal(state_after(8, MASKED, train, (7,), NARROW).take([0]), whole.take([1]))
    eager = state_after(8, MASKED, TRAIN, keys, NARROW)
    torch.testing.assert_close(whole.weights, eager.weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.loss_sum, eager.loss_sum, rtol=1e-5, atol=0)
    assert not torch.equal(whole.weights, eager.weights), "nothing was compiled"


def test_strang_splitting_and_local_attention_go_the_eager_way_too():
    model = dataclasses.replace(NARROW, splitting="strang", attention="local", neighbours=3)
    compiled_ = state_after(4, NOISED, dataclasses.replace(TRAIN, compiled=True), (3, 7), model)
    eager = state_after(4, NOISED, TRAIN, (3, 7), model)
    torch.testing.assert_close(compiled_.weights, eager.weights, rtol=0, atol=1e-4)
    assert not torch.equal(compiled_.weights, eager.weights), "nothing was compiled"


def test_a_process_compiles_more_shapes_than_torch_allows_by_itself(monkeypatch):
    """With a compiler that leaves everything as it is; torch gives up, or goes on eagerly, after 8."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", options=None))
    monkeypatch.setattr(compiled, "_kernels", functools.cache(compiled._kernels.__wrapped__))
    torch._dynamo.reset()
    for members in range(1, 12):
        pack = trainer(NOISED, dataclasses.replace(DOUBLE, compiled=True), range(members), NARROW, chunk=members)
        list(pack.run([1]))
    torch._dynamo.reset()
