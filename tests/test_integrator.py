"""Chunks of boxes and compilation: neither may show in the numbers."""

import functools
import logging
import os

import pytest
import torch

import sim.box
import sim.integrator
from sim.compiling import can_compile
from sim.generator import Generator
from sim.integrator import COMPILED_PAIRS, ahead, chunk_size, compiled_advance, fold, net_force, partners
from sim.particles import ParticleBox, ParticleSystem

CPU = torch.device("cpu")


def crowd(box: ParticleBox, boxes, dtype):
    start = ParticleSystem(box=box, horizon=0.01, restart=0.01).rows("train", boxes, Generator.of("crowd"))
    state = start.columns["state"].to(dtype)
    return state[..., :2].clone(), state[..., 2:].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_a_box_does_not_know_its_company(n, dtype):
    """Bit for bit, across chunks, orders and sizes of the batch."""
    box = ParticleBox(n=n)
    boxes = min(chunk_size(n, 1, CPU, compiled=False), 600) + 45
    x, v = crowd(box, boxes, dtype)
    whole = box.simulate(x, v, 0.03)
    for chosen in (slice(0, 1), slice(3, 40), slice(boxes - 7, None), torch.arange(boxes - 1, -1, -1)):
        some = box.simulate(x[chosen], v[chosen], 0.03)
        for name in ("positions", "velocities", "overlapped"):
            assert torch.equal(getattr(some, name), getattr(whole, name)[chosen]), name
    assert whole.positions.dtype == dtype and whole.overlapped.shape == (boxes, n, n)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_every_pair_is_looked_at_once_and_undone_once(n):
    """Against the whole antisymmetric matrix of forces, summed row by row."""
    matrix = Generator.of("force").normal(n, n, 9, dtype=torch.float64)
    matrix = matrix - matrix.transpose(0, 1)
    other = partners(n, CPU)
    looked = torch.zeros(n, n).index_put_((torch.arange(n), other), torch.ones(()), accumulate=True)
    looked[torch.arange(n), other] -= 0.5 * (other == (torch.arange(n) + n / 2) % n)  # from either side
    assert torch.equal(looked + looked.T, 1 - torch.eye(n))
    x = Generator.of("x").normal(n, 9)
    assert torch.equal(ahead(x), x[other])
    torch.testing.assert_close(net_force(matrix[torch.arange(n), other]), matrix.sum(1))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_fold(count):
    terms = Generator.of("terms").normal(count, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(fold(terms), terms.sum(0))


def test_chunks_hold_about_as_many_pairs():
    many = 1 << 20
    assert chunk_size(16, many, CPU, compiled=False) == 1024 and chunk_size(16, many, CPU, compiled=True) == 2048
    assert chunk_size(1000, many, CPU, compiled=True) == 16
    assert chunk_size(16, many, torch.device("cuda"), compiled=True) == 32768


@pytest.mark.parametrize(("boxes", "size"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (2049, 2048)])
def test_a_compiled_kernel_is_no_larger_than_its_boxes_need(boxes, size):
    assert chunk_size(16, boxes, CPU, compiled=True) == size


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
@pytest.mark.parametrize(("dtype", "limit_damping"), [(torch.float32, False), (torch.float64, True)])
def test_compiled_equals_eager(dtype, limit_damping):
    """More boxes than one compiled chunk, so that the last one is padded."""
    box = ParticleBox(limit_damping=limit_damping)
    x, v = crowd(box, COMPILED_PAIRS // 128 + 7, dtype)
    eager, compiled = (box.simulate(x, v, 0.05, compiled=compiled) for compiled in (False, True))
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-11}
    torch.testing.assert_close(compiled.positions, eager.positions, **close)
    torch.testing.assert_close(compiled.velocities, eager.velocities, rtol=0, atol=100 * close["atol"])
    assert (compiled.overlapped != eager.overlapped).float().mean() < 1e-5
    assert eager.overlapped.any()
    other = ParticleBox(stiffness=3000.0, gravity=0.5, limit_damping=limit_damping)
    with torch.compiler.set_stance("fail_on_recompile"):  # one kernel serves every box of 16 discs
        other.simulate(x, v, 0.02, compiled=True)
    few = box.simulate(x[-9:], v[-9:], 0.05, compiled=True)  # through a smaller kernel
    for name in ("positions", "velocities", "overlapped"):
        assert torch.equal(getattr(few, name), getattr(compiled, name)[-9:]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled):
    box = ParticleBox()
    x, v = crowd(box, 300, torch.float64)
    here, there = box.simulate(x, v, 0.05), box.simulate(x.cuda(), v.cuda(), 0.05, compiled=compiled)
    torch.testing.assert_close(there.positions.cpu(), here.positions, rtol=0, atol=1e-10)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not can_compile(CPU) and can_compile(torch.device("cuda"))


def test_a_failed_compilation_is_logged_and_left_alone(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("the compiler is broken")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with caplog.at_level(logging.INFO, "sim.integrator"):
        assert compiled_advance.__wrapped__(3, 16, torch.float32, CPU, False) is None
    assert "the compiler is broken" in caplog.text


def test_kernels_of_more_sizes_than_torch_allows_by_itself(monkeypatch):
    """With a compiler that leaves everything as it is; torch gives up after 8."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", options=None))
    torch._dynamo.reset()
    for n in range(2, 12):
        assert compiled_advance.__wrapped__(n, 16, torch.float32, CPU, False) is not None, n
    torch._dynamo.reset()


def test_without_compilation_large_jobs_are_eager(monkeypatch):
    box = ParticleBox(n=3)
    x, v = crowd(box, 4, torch.float32)
    asked = []
    monkeypatch.setattr(sim.box, "COMPILE_ABOVE", 0)
    monkeypatch.setattr(sim.box, "can_compile", lambda _: True)
    monkeypatch.setattr(sim.box, "compiled_advance", lambda *key: asked.append(key))
    expected = box.simulate(x, v, 0.02, compiled=False)
    assert not asked
    assert torch.equal(box.simulate(x, v, 0.02).positions, expected.positions)
    assert set(asked) == {(3, 16, torch.float32, CPU, False)}
    with pytest.raises(RuntimeError, match="compiled"):
        box.simulate(x, v, 0.02, compiled=True)


@pytest.mark.parametrize(("n", "particle_steps"), [(1, 1_000_000_000), (16, 125_000_000), (64, 31_250_000)])
def test_compiling_pays_by_the_pairs_that_are_looked_at(monkeypatch, n, particle_steps):
    monkeypatch.setattr(sim.box, "can_compile", lambda _: True)
    monkeypatch.setattr(sim.box, "compiled_advance", lambda *key: key)
    box, like = ParticleBox(n=n, radius=0.02), torch.zeros(4, n, 2)
    assert box.compiles_for(particle_steps, like)
    assert not box.compiles_for(particle_steps - 1, like)


def test_small_jobs_do_not_compile(monkeypatch):
    def compile_it(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(sim.box, "compiled_advance", compile_it)
    box = ParticleBox(n=3)
    box.simulate(*crowd(box, 4, torch.float32), 0.02)
