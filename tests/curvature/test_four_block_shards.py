"""The four-block rule on parts of the rows, against the whole block in float64.

Tolerance 1e-9 (the two numbers of a step travel in the states' own precision, here float64).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from four_block_oracle import assert_close, nearby
from oracles import generator, orthonormal
from torch import Tensor

from distcurv.curvature.four_block import advance
from distcurv.curvature.four_block_shards import (
    SummedProducts,
    advance_shards,
    encode_shard,
    multiply,
)
from distcurv.curvature.four_block_state import FourBlockState, init_state
from distcurv.curvature.four_block_turn import begin_turn, complete_turn, turn
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.curvature.statistics import encode_gradient
from distcurv.errors import ShapeError

BETAS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
SHAPES = [(9, 7, 3, 2), (9, 7, 9, 2), (9, 7, 3, 7), (9, 7, 9, 7)]
PARTS = [((0, 4), (4, 8), (8, 9)), ((0, 1), (1, 9), (9, 9)), ((0, 9), (9, 9), (9, 9))]


def gradients(number: int) -> list[Tensor]:
    random = generator(11)
    scales = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)
    return [
        torch.randn(9, 7, generator=random, dtype=torch.float64) * scales for _ in range(number)
    ]


def summed(products: list[Any]) -> list[SummedProducts]:
    totals = [sum(parts) for parts in zip(*(one.addends for one in products), strict=True)]
    return [SummedProducts(one.in_oa, *(total.clone() for total in totals)) for one in products]  # type: ignore[union-attr]


@pytest.mark.parametrize("spans", PARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_and_a_turn(shape: tuple[int, int, int, int], spans: Any) -> None:
    d_out, d_in, g, a = shape
    out, into = orthonormal(d_out, g, 1), orthonormal(d_in, a, 2)
    state = init_state((d_out, d_in), g, a, dtype=torch.float64)
    parts = [
        init_state((d_out, d_in), g, a, rows=stop - start, dtype=torch.float64)
        for start, stop in spans
    ]
    for step, grad in enumerate(gradients(6), start=1):
        if step == 4:
            new_out, new_in = nearby(out, generator(5), 0.2), nearby(into, generator(6), 0.2)
            state = turn(state, out, into, new_out, new_in)
            turnings = [
                begin_turn(part, out, into, new_out, new_in, span)
                for part, span in zip(parts, spans, strict=True)
            ]
            sums = [sum(each) for each in zip(*(t.addends for t in turnings), strict=True)]
            parts = [
                complete_turn(part, turning, [one.clone() for one in sums])  # type: ignore[union-attr]
                for part, turning in zip(parts, turnings, strict=True)
            ]
            out, into = new_out, new_in
            assert_parts(parts, state, spans)
        rows = [grad[start:stop] for start, stop in spans]
        outs = [out[start:stop] for start, stop in spans]
        products = summed(
            [multiply(own, out_og, into, d_out) for own, out_og in zip(rows, outs, strict=True)]
        )
        (wanted,) = advance([state], [grad], [out], [into], steps=[step], **BETAS)
        got = [
            advance_shards(
                [part], [own], [product], [out_og], [into], [d_out], steps=[step], **BETAS
            )[0].dense()
            for part, own, product, out_og in zip(parts, rows, products, outs, strict=True)
        ]
        assert_close(torch.cat(got), wanted.dense(), 1e-9)
        assert_parts(parts, state, spans)


def assert_parts(parts: list[FourBlockState], state: FourBlockState, spans: Any) -> None:
    for part, (start, stop) in zip(parts, spans, strict=True):
        for name, own, whole in zip(state._fields, part, state, strict=True):
            by_rows = name in ("momentum_OI", "right_Oa", "v_right_Oa") and len(whole) == 9
            assert_close(own, whole[start:stop] if by_rows else whole, 1e-9)


@pytest.mark.parametrize("tail", ["isotropic", "diagonal"])
@pytest.mark.parametrize("encoding_A", ["sketch", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_add_up(shape: tuple[int, int, int, int], encoding_A: str, tail: str) -> None:
    d_out, d_in, g, a = shape
    sides = (SideSpec(d_in, a, tail, encoding_A), SideSpec(d_out, g, tail, "sketch"))
    spec = BlockSpec("block", "lowrank", sides, 0.9)
    basis = {"A.U": orthonormal(d_in, a, 1), "G.U": orthonormal(d_out, g, 2)}
    (grad,) = gradients(1)
    wanted = encode_gradient(spec, grad, basis)
    for spans in PARTS:
        products = summed(
            [multiply(grad[i:j], basis["G.U"][i:j], basis["A.U"], d_out) for i, j in spans]
        )
        statistics = [
            encode_shard(spec, grad[i:j], (i, j), basis, product, counts=not rank)
            for rank, ((i, j), product) in enumerate(zip(spans, products, strict=True))
        ]
        assert statistics[0].keys() == wanted.keys()
        for name, value in wanted.items():
            total = sum(statistic[name] for statistic in statistics)
            assert_close(torch.as_tensor(total).double(), value.double(), 1e-9)


def test_a_gradient_that_is_not_finite_on_one_rank_counts_on_none() -> None:
    spec = BlockSpec("block", "lowrank", (SideSpec(7, 2), SideSpec(9, 3)), 0.9)
    basis = {"A.U": orthonormal(7, 2, 1), "G.U": orthonormal(9, 3, 2)}
    (grad,) = gradients(1)
    grad[8, 0] = float("inf")
    spans = PARTS[0]
    products = summed([multiply(grad[i:j], basis["G.U"][i:j], basis["A.U"], 9) for i, j in spans])
    for (i, j), product in zip(spans, products, strict=True):
        statistic = encode_shard(spec, grad[i:j], (i, j), basis, product, counts=True)
        assert all(not value.any() for value in statistic.values())


@pytest.mark.parametrize("a", [2, 7])
def test_a_gradient_whose_square_is_not_finite_counts_on_no_rank(a: int) -> None:
    """Also where all of it lies in the input basis, and nothing beside it."""
    spec = BlockSpec("block", "lowrank", (SideSpec(7, a), SideSpec(9, 3)), 0.9)
    into, out = orthonormal(7, a, 1).float(), orthonormal(9, 3, 2).float()
    grad = torch.outer(torch.ones(9), into[:, 0]) * 1e19
    spans = PARTS[0]
    products = summed([multiply(grad[i:j], out[i:j], into, 9) for i, j in spans])
    for (i, j), product in zip(spans, products, strict=True):
        basis = {"A.U": into, "G.U": out}
        statistic = encode_shard(spec, grad[i:j], (i, j), basis, product, counts=True)
        assert all(not value.any() for value in statistic.values())


def test_what_does_not_fit_is_refused() -> None:
    (grad,) = gradients(1)
    with pytest.raises(ShapeError, match="rows of U_G"):
        multiply(grad[:4], orthonormal(9, 3, 1), orthonormal(7, 2, 2), 9)
    spec = BlockSpec("b", "lowrank", (SideSpec(7, 2), SideSpec(9, 3, "isotropic", "dense")), 0.9)
    product = summed([multiply(grad, orthonormal(9, 3, 1), orthonormal(7, 2, 2), 9)])[0]
    with pytest.raises(ShapeError, match="only a sketch"):
        encode_shard(spec, grad, (0, 9), {}, product, counts=True)
