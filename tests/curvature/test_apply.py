"""The apply in place against the dense inverses in float64.

Tolerances: 1e-12 in float64; in float32 a direction that both sides damp by w/D loses a share of
1e-7 · w/D of each, as every factored inverse does (see `test_inverse`).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, orthonormal, relative_error
from torch import Tensor

from distcurv.curvature.apply import (
    AffineGradient,
    DenseSides,
    Prepared,
    ThinFactors,
    apply,
    finish,
    prepare,
)
from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import (
    DenseInverse,
    Inverse,
    LowRankInverse,
    invert_diagonal,
    invert_low_rank,
)
from distcurv.curvature.norm_rule import graft_scale

TAILS = ["none", "isotropic", "diagonal", "alone"]  # alone: a diagonal without a basis


def inverse_of(
    d: int, r: int, tail: str, seed: int, top: float = 5.0, dtype: torch.dtype = torch.float64
) -> LowRankInverse:
    """Of a factor with eigenvalues from ``top`` down to 1 and a damping of 0.2."""
    lam = torch.linspace(top, 1.0, r, dtype=torch.float64)
    value: Tensor | None = None
    if tail == "isotropic":
        value = torch.full((1,), 0.0 if r == d else 0.5, dtype=torch.float64)
    if tail == "diagonal":
        value = 0.2 + 0.7 * torch.rand(d, generator=generator(seed), dtype=torch.float64)
    if tail == "alone":
        entries = torch.linspace(top, 0.5, d, dtype=torch.float64)
        return invert_diagonal(entries.to(dtype), torch.tensor(0.2, dtype=dtype))
    estimate = Estimate(orthonormal(d, r, seed), lam, value, lam.sum())
    return invert_low_rank(estimate.to(dtype), torch.tensor(0.2, dtype=dtype))


def random_gradient(
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    bias: bool,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> AffineGradient:
    matrix = torch.randn(O, I, generator=generator(seed), dtype=torch.float64).to(dtype)
    if not bias:
        return AffineGradient(matrix, None)
    return AffineGradient(matrix[:, :-1].contiguous(), matrix[:, -1].contiguous())


def copied(grad: AffineGradient) -> AffineGradient:
    return AffineGradient(*(None if part is None else part.clone() for part in grad))  # type: ignore[arg-type]


def expected_direction(inverse_G: Inverse, inverse_A: Inverse, grad: AffineGradient) -> Tensor:
    return inverse_G.dense().double() @ grad.whole().double() @ inverse_A.dense().double()


def places(grad: AffineGradient) -> list[int]:
    return [part.data_ptr() for part in grad if part is not None]


def applied(prepared: Prepared, grad: AffineGradient) -> Tensor:
    """P without a norm rule, [..., O, I]."""
    finish(grad, apply(prepared, grad).row_O1, None)
    return grad.whole()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail_A", TAILS)
@pytest.mark.parametrize("tail_G", TAILS)
def test_equals_the_dense_product_and_measures_it(tail_G: str, tail_A: str, bias: bool) -> None:
    G, A = inverse_of(9, 4, tail_G, seed=1), inverse_of(7, 3, tail_A, seed=2)
    prepared = prepare(G, A, bias=bias)
    assert isinstance(prepared, ThinFactors)
    for seed in range(2):  # the room of the first apply is that of the second
        grad = random_gradient(9, 7, bias, seed)
        before, where = copied(grad).whole(), places(grad)
        wanted = expected_direction(G, A, grad)
        done = apply(prepared, grad, norms=True, inner=True)
        assert done.grad_norm is not None
        assert done.norm is not None
        assert done.inner is not None
        assert done.grad_norm.item() == pytest.approx(before.norm().item(), rel=1e-13)
        assert done.norm.item() == pytest.approx(wanted.norm().item(), rel=1e-12)
        assert done.inner.item() == pytest.approx((before * wanted).sum().item(), rel=1e-12)
        finish(grad, done.row_O1, None)
        assert relative_error(grad.whole(), wanted) < 1e-12
        assert places(grad) == where


@given(
    O=st.integers(1, 12),
    I=st.integers(2, 12),
    share=st.floats(0.05, 1.0),
    tails=st.tuples(st.sampled_from(TAILS), st.sampled_from(TAILS)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_rank(
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    share: float,
    tails: tuple[str, str],
    bias: bool,
    seed: int,
) -> None:
    g, a = max(1, round(share * O)), max(1, round(share * I))
    G, A = inverse_of(O, g, tails[0], seed), inverse_of(I, a, tails[1], seed + 1)
    grad = random_gradient(O, I, bias, seed)
    wanted = expected_direction(G, A, grad)
    assert relative_error(applied(prepare(G, A, bias=bias), grad), wanted) < 1e-11


@pytest.mark.parametrize("tail_A", TAILS)
@pytest.mark.parametrize("tail_G", TAILS)
def test_a_batch_equals_its_blocks(tail_G: str, tail_A: str) -> None:
    pairs = [(inverse_of(6, 3, tail_G, s), inverse_of(8, 2, tail_A, 9 + s)) for s in range(3)]
    grads = [random_gradient(6, 8, False, s) for s in range(3)]
    stacked = [
        LowRankInverse(
            torch.stack([pair[side].inv_diag for pair in pairs]),
            torch.stack([pair[side].W_dr for pair in pairs]),
        )
        for side in (0, 1)
    ]
    batch = AffineGradient(torch.stack([grad.weight_OD for grad in grads]), None)
    done = apply(prepare(stacked[0], stacked[1], bias=False), batch, norms=True, inner=True)
    assert done.grad_norm is not None
    assert done.norm is not None
    finish(batch, done.row_O1, graft_scale(done.grad_norm, done.norm))
    for i, ((G, A), grad) in enumerate(zip(pairs, grads, strict=True)):
        wanted = expected_direction(G, A, grad)
        inner = (grad.whole() * wanted).sum()
        assert done.inner is not None
        assert done.inner[i].item() == pytest.approx(inner.item(), rel=1e-11)
        wanted = wanted * (grad.whole().norm() / wanted.norm())
        assert relative_error(batch.weight_OD[i], wanted) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("low_rank", ["neither", "A", "G"])
def test_a_side_that_is_a_matrix(low_rank: str, bias: bool) -> None:
    G: Inverse = inverse_of(5, 2, "diagonal", 1)
    A: Inverse = inverse_of(6, 2, "isotropic", 2)
    if low_rank != "G":
        G = DenseInverse(G.dense())
    if low_rank != "A":
        A = DenseInverse(A.dense())
    prepared = prepare(G, A, bias=bias)
    assert isinstance(prepared, DenseSides)
    grad = random_gradient(5, 6, bias)
    before, where, wanted = grad.whole().clone(), places(grad), expected_direction(G, A, grad)
    done = apply(prepared, grad, norms=True, inner=True)
    assert done.grad_norm is not None
    assert done.norm is not None
    assert done.inner is not None
    finish(grad, done.row_O1, torch.tensor(0.5, dtype=torch.float64))
    assert relative_error(grad.whole(), 0.5 * wanted) < 1e-13
    assert places(grad) == where
    assert done.grad_norm.item() == pytest.approx(before.norm().item(), rel=1e-13)
    assert done.norm.item() == pytest.approx(wanted.norm().item(), rel=1e-13)
    assert done.inner.item() == pytest.approx((before * wanted).sum().item(), rel=1e-13)


@pytest.mark.parametrize("top", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("tail_A", TAILS)
def test_float32_errs_as_the_factored_inverse_does(tail_A: str, top: float) -> None:
    """D is 0.2 at least, so that w/D is 5 ``top``."""
    O, I, r = 60, 81, 8  # noqa: E741
    exact = inverse_of(O, r, "diagonal", 1, top), inverse_of(I, r, tail_A, 2, top)
    G = inverse_of(O, r, "diagonal", 1, top, torch.float32)
    A = inverse_of(I, r, tail_A, 2, top, torch.float32)
    prepared = prepare(G, A, bias=True)
    grad = random_gradient(O, I, True, 3, torch.float32)
    wanted = expected_direction(*exact, grad)
    assert relative_error(applied(prepared, grad), wanted) < 3e-6

    # All of the gradient in the direction that G damps most: what is left is 1/(5 top) of it.
    u, v = orthonormal(O, r, 1)[:, :1], torch.randn(1, I, generator=generator(4)).double()
    matrix = (u @ v).float()
    grad = AffineGradient(matrix[:, :-1].contiguous(), matrix[:, -1].contiguous())
    wanted = expected_direction(*exact, grad)
    assert relative_error(applied(prepared, grad), wanted) < 1e-6 * max(1.0, 5 * top)


@pytest.mark.parametrize("top", [1.0, 1e2, 1e4])
def test_the_inner_product_errs_little_beside_the_undamped_one(top: float) -> None:
    """As documented: 1e-7 · max(row) ‖X‖² (here times 3), wherever the gradient points."""
    O, I, r = 60, 81, 8  # noqa: E741
    exact = inverse_of(O, r, "diagonal", 1, top), inverse_of(I, r, "isotropic", 2, top)
    G = inverse_of(O, r, "diagonal", 1, top, torch.float32)
    A = inverse_of(I, r, "isotropic", 2, top, torch.float32)
    prepared = prepare(G, A, bias=False)
    assert isinstance(prepared, ThinFactors)
    top_top = orthonormal(O, r, 1)[:, :1] @ orthonormal(I, r, 2)[:, :1].mT
    noise = torch.randn(O, I, generator=generator(4), dtype=torch.float64) / math.sqrt(O * I)
    for share in (0.0, 0.01, 1.0):
        grad = AffineGradient((top_top + share * noise).float(), None)
        size = grad.whole().double().square().sum().item() * prepared.row_O1.max().item()
        wanted = (grad.whole().double() * expected_direction(*exact, grad)).sum().item()
        got = apply(prepared, grad, inner=True).inner
        assert got is not None
        assert got.dtype == torch.float64
        assert abs(got.item() - wanted) < 3e-7 * size


def test_a_zero_gradient_stays_zero_with_grafting() -> None:
    prepared = prepare(inverse_of(4, 2, "diagonal", 0), inverse_of(5, 2, "none", 1), bias=True)
    grad = AffineGradient(torch.zeros(4, 4).double(), torch.zeros(4).double())
    done = apply(prepared, grad, norms=True)
    assert done.grad_norm is not None
    assert done.norm is not None
    finish(grad, done.row_O1, graft_scale(done.grad_norm, done.norm))
    assert torch.equal(grad.whole(), torch.zeros(4, 5).double())


def test_nothing_of_the_size_of_the_gradient_is_allocated() -> None:
    """By the largest tensor that any operation makes: a gradient has 1e6 numbers here."""
    O, I, r = 1000, 1001, 4  # noqa: E741
    G = inverse_of(O, r, "diagonal", 1, dtype=torch.float32)
    A = inverse_of(I, r, "isotropic", 2, dtype=torch.float32)
    prepared = prepare(G, A, bias=True)
    grad = random_gradient(O, I, True, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        done = apply(prepared, grad, norms=True, inner=True)
        assert done.grad_norm is not None
        assert done.norm is not None
        finish(grad, done.row_O1, graft_scale(done.grad_norm, done.norm))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 100 * (O + I) * 4  # bytes; the gradient takes 4e6
