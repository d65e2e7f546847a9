"""The four-block install: the total is conserved, and full rank is SOAP written out densely."""

from __future__ import annotations

import pytest
import torch
from four_block_oracle import (
    SHAPES,
    assert_close,
    complement,
    dense_parts,
    dimensions,
    fresh,
    generator,
    nearby,
    orthonormal,
    skewed,
    squared_rotation_soap,
    step,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcurv.curvature import four_block_state, four_block_turn


@pytest.mark.parametrize(("d_out", "d_in"), [(9, 6), (5, 11), (8, 8), (1, 4)])
def test_full_rank_equals_dense_soap(d_out: int, d_in: int) -> None:
    """30 steps, a new basis every third: the eigenbasis of running factors, as SOAP's."""
    gen = generator(5)
    grads = [skewed(d_out, d_in, gen) for _ in range(30)]
    factor_out = torch.zeros(d_out, d_out, dtype=torch.float64)
    factor_in = torch.zeros(d_in, d_in, dtype=torch.float64)
    bases: list[tuple[Tensor, Tensor]] = []
    for t, x in enumerate(grads):
        factor_out, factor_in = factor_out + x @ x.T, factor_in + x.T @ x
        if t % 3 == 0:
            bases.append((torch.linalg.eigh(factor_out)[1], torch.linalg.eigh(factor_in)[1]))
        else:
            bases.append(bases[-1])
    state = four_block_state.init_state((d_out, d_in), d_out, d_in, dtype=torch.float64)
    expected = squared_rotation_soap(grads, bases)
    for t, (x, (u, w)) in enumerate(zip(grads, bases, strict=True)):
        if t and t % 3 == 0:
            state = four_block_turn.turn(state, *bases[t - 1], u, w)
        direction, state = step(state, x, u, w, t + 1)
        # At a new basis some entries of the core are rounding beside eps: the looser tolerance.
        assert_close(direction, expected[t], 1e-7)


@settings(max_examples=150, deadline=None)
@given(dims=dimensions, seed=st.integers(0, 10_000), by=st.sampled_from([0.0, 1e-7, 0.1, 100.0]))
def test_turn_conserves_the_total_second_moment(
    dims: tuple[int, int, int, int, int, int], seed: int, by: float
) -> None:
    """Any old and new ranks, full ones among them; the same basis, nearby ones, unrelated ones."""
    d_out, d_in, g, a, h, b = dims
    gen = generator(seed)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    new_u = nearby(u, gen, by) if g == h else orthonormal(d_out, h, gen)
    new_w = nearby(w, gen, by) if a == b else orthonormal(d_in, b, gen)
    state = trained((d_out, d_in, g, a), u, w, seed)
    turned = four_block_turn.turn(state, u, w, new_u, new_w)
    before = four_block_turn.second_moment_total(state, u, w)
    after = four_block_turn.second_moment_total(turned, new_u, new_w)
    # Coordinates that lie in the old basis to within MIN_OUTSIDE share out a little differently.
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0.0)
    assert all(bool((v >= 0).all()) for v in (*turned.moments, turned.v_rest))
    for one in (state, turned):
        if one.right_Oa.numel() and one.left_gI.numel():
            inside = sum(moment.sum() for moment in one.moments)
            torch.testing.assert_close(one.v_parts, inside, rtol=1e-9, atol=1e-12)
    full = fresh((d_out, d_in, h, b))
    assert [t.shape for t in turned] == [t.shape for t in full]


@pytest.mark.parametrize("shape", SHAPES)
def test_turn_to_the_same_basis_changes_nothing(shape: tuple[int, int, int, int]) -> None:
    d_out, d_in, g, a = shape
    gen = generator(6)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    state = trained(shape, u, w, 6)
    for before, after in zip(state, four_block_turn.turn(state, u, w, u, w), strict=True):
        assert_close(after, before)


def test_turn_follows_permuted_and_flipped_directions() -> None:
    shape, gen = (10, 8, 4, 3), generator(7)
    u, w = orthonormal(10, 4, gen), orthonormal(8, 3, gen)
    state = trained(shape, u, w, 7)
    order = torch.tensor([2, 0, 3, 1])
    turned = four_block_turn.turn(state, u, w, -u[:, order], w)
    assert_close(turned.v_core_ga, state.v_core_ga[order])
    assert_close(turned.v_left_gI, state.v_left_gI[order])
    assert_close(turned.core_ga, -state.core_ga[order])
    assert_close(turned.v_right_Oa, state.v_right_Oa)
    assert_close(turned.v_rest, state.v_rest)


@pytest.mark.parametrize("source", ["core", "rest"])
def test_turn_equals_the_exact_second_moments(source: str) -> None:
    """With energy in the core or in the rest alone the covariance of vec X is known exactly."""
    gen = generator(8)
    d_out, d_in, g, a, h, b = 7, 6, 3, 2, 2, 3
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    new_u, new_w = orthonormal(d_out, h, gen), orthonormal(d_in, b, gen)
    state = fresh((d_out, d_in, g, a))
    if source == "core":
        state.v_core_ga.copy_(torch.rand(g, a, generator=gen, dtype=torch.float64))
        state.v_parts.copy_(state.v_core_ga.sum())
        axes_out, axes_in, variance = u, w, state.v_core_ga
    else:
        state.v_rest.fill_(0.7)
        axes_out, axes_in = complement(u), complement(w)
        variance = torch.full((d_out - g, d_in - a), 0.7, dtype=torch.float64)
    turned = four_block_turn.turn(state, u, w, new_u, new_w)
    core, right, left, rest = 0.0, 0.0, 0.0, 0.0
    for i in range(variance.shape[0]):
        for j in range(variance.shape[1]):
            atom = variance[i, j].sqrt() * torch.outer(axes_out[:, i], axes_in[:, j])
            parts = dense_parts(atom, new_u, new_w)
            core = core + (new_u.T @ atom @ new_w).square()
            right = right + (parts["right"] @ new_w).square()
            left = left + (new_u.T @ parts["left"]).square()
            rest = rest + parts["rest"].square().sum()
    assert_close(turned.v_core_ga, torch.as_tensor(core))
    assert_close(turned.v_rest * (d_out - h) * (d_in - b), torch.as_tensor(rest))
    if source == "core":
        assert_close(turned.v_right_Oa, torch.as_tensor(right))
        assert_close(turned.v_left_gI, torch.as_tensor(left))
    else:  # shared out by coordinate, so exact in the sum over coordinates only
        assert_close(turned.v_right_Oa.sum(0), torch.as_tensor(right).sum(0))
        assert_close(turned.v_left_gI.sum(1), torch.as_tensor(left).sum(1))


def test_turn_from_side_parts_equals_the_written_out_sums() -> None:
    """Right and left moments, entry by entry as the design's formulas have them."""
    gen = generator(9)
    d_out, d_in, g, a, h, b = 6, 5, 2, 2, 3, 1
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    new_u, new_w = orthonormal(d_out, h, gen), orthonormal(d_in, b, gen)
    state = trained((d_out, d_in, g, a), u, w, 9)
    turned = four_block_turn.turn(state, u, w, new_u, new_w)

    def side(old: Tensor, new: Tensor) -> dict[str, Tensor]:
        p = torch.diagonal(complement(old) @ complement(old).T)
        bc = torch.stack(
            [
                (complement(old) @ complement(old).T @ new[:, k]).square() / p
                for k in range(new.shape[1])
            ]
        )
        cb = (complement(new) @ complement(new).T @ old).square()
        return {"bb": (new.T @ old).square(), "cb": cb, "bc": bc, "cc": 1 - bc.sum(0), "p": p}

    o, i = side(u, new_u), side(w, new_w)
    c, r, le, v = state.v_core_ga, state.v_right_Oa, state.v_left_gI, state.v_rest
    core, right = torch.zeros(h, b).double(), torch.zeros(d_out, b).double()
    for k in range(h):
        for m in range(b):
            core[k, m] = (
                o["bb"][k] @ c @ i["bb"][m]
                + o["bb"][k] @ le @ i["bc"][m]
                + o["bc"][k] @ r @ i["bb"][m]
                + v * (o["bc"][k] @ o["p"]) * (i["bc"][m] @ i["p"])
            )
    for n in range(d_out):
        for m in range(b):
            right[n, m] = (
                o["cb"][n] @ c @ i["bb"][m]
                + o["cb"][n] @ le @ i["bc"][m]
                + o["cc"][n] * (r[n] @ i["bb"][m])
                + v * o["cc"][n] * o["p"][n] * (i["bc"][m] @ i["p"])
            )
    assert_close(turned.v_core_ga, core)
    assert_close(turned.v_right_Oa, right)


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_turn_from_a_basis_that_holds_coordinate_axes(rank: int) -> None:
    """Such coordinates have nothing outside the basis to share out: no 0/0, nothing lost."""
    gen = generator(12)
    u, w = torch.eye(6, dtype=torch.float64)[:, :3], torch.eye(5, dtype=torch.float64)[:, 1:3]
    new_u, new_w = orthonormal(6, rank, gen), orthonormal(5, 5, gen)
    state = trained((6, 5, 3, 2), u, w, 12)
    turned = four_block_turn.turn(state, u, w, new_u, new_w)
    assert all(bool(t.isfinite().all()) for t in turned)
    before = four_block_turn.second_moment_total(state, u, w)
    after = four_block_turn.second_moment_total(turned, new_u, new_w)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0.0)


def test_turn_projects_the_momentum_on_the_new_basis() -> None:
    shape, gen = (10, 8, 4, 3), generator(10)
    u, w = orthonormal(10, 4, gen), orthonormal(8, 3, gen)
    new_u, new_w = orthonormal(10, 2, gen), orthonormal(8, 5, gen)
    state = trained(shape, u, w, 10)
    turned = four_block_turn.turn(state, u, w, new_u, new_w)
    assert_close(turned.momentum_OI, state.momentum_OI)
    assert_close(turned.core_ga, new_u.T @ state.momentum_OI @ new_w)
    assert_close(turned.right_Oa, dense_parts(state.momentum_OI, new_u, new_w)["right"] @ new_w)
    assert_close(turned.left_gI, new_u.T @ dense_parts(state.momentum_OI, new_u, new_w)["left"])


@pytest.mark.parametrize(
    ("old_u", "old_w", "message"),
    [
        (torch.eye(5)[:, :3], torch.eye(4)[:, :2], "old bases of rank"),
        (torch.eye(5)[:, :2], torch.eye(5)[:, :2], "input basis has shape"),
    ],
)
def test_foreign_bases_are_refused_by_name(old_u: Tensor, old_w: Tensor, message: str) -> None:
    new_u, new_w = torch.eye(5)[:, :2], torch.eye(4)[:, :2]
    with pytest.raises(ValueError, match=message):
        four_block_turn.turn(fresh((5, 4, 2, 2), torch.float32), old_u, old_w, new_u, new_w)
