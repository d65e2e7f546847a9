"""The apply in two halves, on parts of a gradient, against the whole one in float64.

The numbers for the norm rules travel in float32: 1e-6; the directions 1e-11.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import generator, orthonormal, relative_error
from torch import Tensor

from distcurv.curvature.apply import (
    AffineGradient,
    Applied,
    DenseSides,
    apply,
    finish,
    prepare,
    prepare_block,
)
from distcurv.curvature.apply_shards import begin, complete, cut_prepared
from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import LowRankInverse, invert_diagonal, invert_low_rank
from distcurv.curvature.one_sided import invert_units

TAILS = ["none", "isotropic", "diagonal"]
# Three parts: uneven, one of a single row, one empty.
PARTS = [((0, 4), (4, 8), (8, 9)), ((0, 1), (1, 9), (9, 9)), ((0, 9), (9, 9), (9, 9))]


def inverse_of(d: int, r: int, tail: str, seed: int) -> LowRankInverse:
    lam = torch.linspace(5.0, 1.0, r, dtype=torch.float64)
    value: Tensor | None = None
    if tail == "isotropic":
        value = torch.full((1,), 0.0 if r == d else 0.5, dtype=torch.float64)
    if tail == "diagonal":
        value = 0.2 + torch.rand(d, generator=generator(seed), dtype=torch.float64)
    estimate = Estimate(orthonormal(d, r, seed), lam, value, lam.sum())
    return invert_low_rank(estimate, torch.tensor(0.2, dtype=torch.float64))


def random_gradient(O: int, D: int, bias: bool) -> AffineGradient:  # noqa: E741
    random = generator(7)
    weight = torch.randn(O, D, generator=random, dtype=torch.float64)
    vector = torch.randn(O, generator=random, dtype=torch.float64) if bias else None
    return AffineGradient(weight, vector)


def copied(grad: AffineGradient) -> AffineGradient:
    return AffineGradient(grad[0].clone(), None if grad[1] is None else grad[1].clone())


def in_parts(
    prepared: Any, grad: AffineGradient, side: str, spans: Any, bias_spans: Any
) -> tuple[AffineGradient, Applied]:
    """What the ranks would do, one after the other; their sum is torch's."""
    prepareds, grads = [], []
    for span, bias_span in zip(spans, bias_spans, strict=True):
        # Every rank has its own, with the room in it.
        prepareds.append(cut_prepared(copy.deepcopy(prepared), side, span, bias_span))
        rows = slice(*span)
        weight = grad.weight_OD[:, rows] if side == "A" else grad.weight_OD[rows]
        bias = None if grad.bias_O is None else grad.bias_O[slice(*bias_span)].clone()
        grads.append(AffineGradient(weight.contiguous().clone(), bias))
    halves = [begin(p, g, measure=True) for p, g in zip(prepareds, grads, strict=True)]
    summed = [sum(parts) for parts in zip(*(half.addends for half in halves), strict=True)]
    done = [
        complete(p, g, half, summed, square=True)  # type: ignore[arg-type]
        for p, g, half in zip(prepareds, grads, halves, strict=True)
    ]
    for part, one in zip(grads, done, strict=True):
        finish(part, one.row_o1, None)
    weight = torch.cat([part.weight_OD for part in grads], 1 if side == "A" else 0)
    bias = None if grad.bias_O is None else torch.cat([part[1] for part in grads])  # type: ignore[misc]
    assert all(torch.equal(one.grad_norm, done[0].grad_norm) for one in done)  # type: ignore[arg-type]
    norm = sum(one.square for one in done).sqrt()  # type: ignore[union-attr]
    return AffineGradient(weight, bias), Applied(None, done[0].grad_norm, norm, done[0].inner)


def assert_same(got: tuple[AffineGradient, Applied], prepared: Any, grad: AffineGradient) -> None:
    whole = copied(grad)
    wanted = apply(prepared, whole, norms=True, inner=True)
    finish(whole, wanted.row_O1, None)
    parts, measured = got
    assert relative_error(parts.whole(), whole.whole()) < 1e-11
    assert wanted.grad_norm is not None
    assert wanted.norm is not None
    assert wanted.inner is not None
    assert float(measured.grad_norm) == pytest.approx(float(wanted.grad_norm), rel=1e-6)  # type: ignore[arg-type]
    assert float(measured.norm) == pytest.approx(float(wanted.norm), rel=1e-6)  # type: ignore[arg-type]
    scale = float(wanted.grad_norm * wanted.norm)
    assert float(measured.inner) == pytest.approx(float(wanted.inner), abs=1e-6 * scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("spans", PARTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail_A", TAILS)
@pytest.mark.parametrize("tail_G", TAILS)
def test_rows(tail_G: str, tail_A: str, bias: bool, spans: Any) -> None:
    G, A = inverse_of(9, 4, tail_G, 1), inverse_of(7, 3, tail_A, 2)
    prepared, grad = prepare(G, A, bias=bias), random_gradient(9, 7 - bias, bias)
    assert not isinstance(prepared, DenseSides)
    assert_same(in_parts(prepared, grad, "G", spans, spans), prepared, grad)


@pytest.mark.parametrize("spans", PARTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail_A", TAILS)
@pytest.mark.parametrize("tail_G", TAILS)
def test_columns(tail_G: str, tail_A: str, bias: bool, spans: Any) -> None:
    G, A = inverse_of(5, 2, tail_G, 1), inverse_of(9 + bias, 3, tail_A, 2)
    prepared, grad = prepare(G, A, bias=bias), random_gradient(5, 9, bias)
    # The bias is divided along the outputs, whatever part of the inputs a rank has.
    bias_spans = ((0, 2), (2, 5), (5, 5))
    assert not isinstance(prepared, DenseSides)
    assert_same(in_parts(prepared, grad, "A", spans, bias_spans), prepared, grad)


@pytest.mark.parametrize("spans", PARTS)
def test_a_diagonal_input_side_needs_no_sum(spans: Any) -> None:
    counts = torch.arange(9, dtype=torch.float64)
    A = invert_diagonal(counts, torch.tensor(0.3, dtype=torch.float64))
    prepared = prepare(inverse_of(5, 2, "diagonal", 1), A, bias=False)
    grad = random_gradient(5, 9, False)
    assert not isinstance(prepared, DenseSides)
    half = begin(cut_prepared(prepared, "A", (0, 4), (0, 0)), _columns(grad, 0, 4), measure=False)
    assert sum(part.numel() for part in half.addends) == 0
    assert_same(in_parts(prepared, grad, "A", spans, [(0, 0)] * 3), prepared, grad)


def _columns(grad: AffineGradient, start: int, stop: int) -> AffineGradient:
    return AffineGradient(grad.weight_OD[:, start:stop].clone(), None)


@pytest.mark.parametrize("spans", PARTS)
@pytest.mark.parametrize("kind", ["unitwise", "diagonal"])
def test_units(kind: str, spans: Any) -> None:
    random = generator(3)
    ww, bb = (0.5 + torch.rand(2, 9, generator=random, dtype=torch.float64)).unbind()
    damping = torch.tensor(0.1, dtype=torch.float64)
    bias = kind == "unitwise"
    inverse = invert_units(ww, 0.3 * bb, bb, damping) if bias else invert_diagonal(ww, damping)
    prepared, grad = prepare_block([inverse], bias=bias), random_gradient(9, 1, bias)
    assert_same(in_parts(prepared, grad, "F", spans, spans), prepared, grad)


def test_only_the_sum_makes_it_whole() -> None:
    """That the comparison can fail: a rank that went on with its own addends would be far off."""
    prepared = prepare(
        inverse_of(9, 4, "diagonal", 1), inverse_of(7, 3, "isotropic", 2), bias=False
    )
    assert not isinstance(prepared, DenseSides)
    grad = random_gradient(9, 7, False)
    whole, part = copied(grad), AffineGradient(grad.weight_OD[:4].clone(), None)
    finish(whole, apply(prepared, whole).row_O1, None)
    own = cut_prepared(prepared, "G", (0, 4), (0, 4))
    half = begin(own, part, measure=False)
    finish(part, complete(own, part, half, half.addends).row_o1, None)
    assert relative_error(part.weight_OD, whole.weight_OD[:4]) > 0.01
