"""The four-block step against the dense rule, in float64 and in float32."""

from __future__ import annotations

import pytest
import torch
from four_block_oracle import (
    BETA1,
    BETA2,
    EPS,
    FLOAT32,
    FLOAT64,
    SHAPES,
    DenseFourBlock,
    assert_close,
    dense_parts,
    dimensions,
    fresh,
    generator,
    nearby,
    orthonormal,
    skewed,
    step,
    update,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcurv.curvature import four_block, four_block_parts, four_block_state, four_block_turn


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_orthogonal_and_sum_to_the_matrix(shape: tuple[int, int, int, int]) -> None:
    d_out, d_in, g, a = shape
    gen = generator(1)
    x, u, w = skewed(d_out, d_in, gen), orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    parts = four_block_parts.split(x, u, w)
    full = [u @ parts.core_ga @ w.T]
    full.append(parts.right_Oa @ w.T if parts.right_Oa.numel() else torch.zeros_like(x))
    full.append(u @ parts.left_gI if parts.left_gI.numel() else torch.zeros_like(x))
    full.append(x - sum(full))
    for got, expected in zip(full, dense_parts(x, u, w).values(), strict=True):
        assert float((got - expected).abs().max()) <= FLOAT64 * float(x.abs().max())
    for i in range(4):
        for j in range(i):
            assert abs(float((full[i] * full[j]).sum())) <= FLOAT64 * float(x.square().sum())
    if g < d_out and a < d_in:
        (mean_square,), (inside,) = four_block_parts.energies([x], [parts])
        energy = sum((full[i].square().sum() for i in range(3)), torch.zeros(()))
        torch.testing.assert_close(inside, energy, rtol=1e-8, atol=1e-13)
        assert mean_square.dtype == torch.float64
        expected = full[3].square().sum() / ((d_out - g) * (d_in - a))
        torch.testing.assert_close(mean_square, expected, rtol=1e-8, atol=1e-13)
    assert (parts.right_Oa.numel() == 0) == (g == d_out)
    assert (parts.left_gI.numel() == 0) == (a == d_in)


@pytest.mark.parametrize("shape", SHAPES)
def test_direction_equals_the_dense_rule(shape: tuple[int, int, int, int]) -> None:
    d_out, d_in, g, a = shape
    gen = generator(2)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    reference, state = DenseFourBlock(u, w), fresh(shape)
    for t in range(1, 16):
        x = skewed(d_out, d_in, gen)
        direction, state = step(state, x, u, w, t)
        assert_close(direction, reference.update(x), 1e-7)


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6])
def test_a_small_rest_is_divided_by_the_floor(rest: float) -> None:
    """The rest's own root would give it the size of the other parts, however small it is."""
    d_out, d_in, g, a = shape = (12, 10, 3, 2)
    gen = generator(14)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    reference, state = DenseFourBlock(u, w), fresh(shape)
    for t in range(1, 6):
        x = torch.randn(d_out, d_in, generator=gen, dtype=torch.float64)
        x = x - (1 - rest) * dense_parts(x, u, w)["rest"]
        direction, state = step(state, x, u, w, t)
        assert_close(direction, reference.update(x), 1e-7)
    size = float(dense_parts(direction, u, w)["rest"].abs().max())
    assert size < 300 * rest, "the floor is a hundredth of the root of the mean second moment"


def test_a_rest_of_pure_rounding_is_floored() -> None:
    """A gradient that lies in the bases leaves a rest of rounding, which must not be blown up."""
    gen = generator(3)
    u, w = orthonormal(40, 3, gen), orthonormal(30, 3, gen)
    state = four_block_state.init_state((40, 30), 3, 3)
    for t in range(1, 6):
        core = torch.randn(3, 3, generator=gen, dtype=torch.float64)
        x = (u @ core @ w.T).float()
        direction, state = step(state, x, u.float(), w.float(), t)
        rest = dense_parts(direction.double(), u, w)["rest"]
        assert float(rest.abs().max()) < 1e-3
        assert float(direction.abs().max()) < 10


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_the_momentum_follow_by_ema(shape: tuple[int, int, int, int]) -> None:
    d_out, d_in, g, a = shape
    gen = generator(4)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    state = fresh(shape)
    for t in range(1, 30):
        _, state = step(state, skewed(d_out, d_in, gen), u, w, t)
    again = four_block_parts.split(state.momentum_OI, u, w)
    for kept, recomputed in zip(state[1:4], again, strict=True):
        assert_close(kept, recomputed)


def test_all_blocks_together_equal_each_alone() -> None:
    """Blocks of all shapes, at different steps, some of their projections made before."""
    gen = generator(11)
    bases = [(orthonormal(o, g, gen), orthonormal(i, a, gen)) for o, i, g, a in SHAPES]
    outs, ins = [u for u, _ in bases], [w for _, w in bases]
    alone, together = [fresh(shape) for shape in SHAPES], [fresh(shape) for shape in SHAPES]
    ages = [1 + n % 3 for n in range(len(SHAPES))]
    for t in range(4):
        xs = [skewed(o, i, gen) for o, i, _, _ in SHAPES]
        made = [four_block_parts.project(x, u, w) for x, (u, w) in zip(xs, bases, strict=True)]
        directions = four_block.advance(
            together,
            xs,
            outs,
            ins,
            steps=[age + t for age in ages],
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            projections=[one if n % 2 else None for n, one in enumerate(made)],
        )
        for n, (u, w) in enumerate(bases):
            expected, alone[n] = step(alone[n], xs[n], u, w, ages[n] + t)
            assert_close(directions[n].dense(), expected)
            for got, wanted in zip(together[n], alone[n], strict=True):
                assert_close(got, wanted)
            target = torch.ones_like(expected)
            directions[n].subtract_from(target, 0.5)
            assert_close(target, 1 - 0.5 * expected)


def test_no_blocks_give_no_directions() -> None:
    assert four_block.advance([], [], [], [], steps=[]) == []


@pytest.mark.parametrize("shape", [*SHAPES, (96, 64, 16, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_float32_stays_near_float64(shape: tuple[int, int, int, int], scale: float) -> None:
    """20 steps with two turns, gradients of very different scale."""
    d_out, d_in, g, a = shape
    gen = generator(12)
    narrow, wide = fresh(shape, torch.float32), fresh(shape)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    for t in range(1, 21):
        if t % 7 == 0:
            new_u, new_w = nearby(u, gen, 0.3), nearby(w, gen, 0.3)
            wide = four_block_turn.turn(wide, u, w, new_u, new_w)
            narrow = four_block_turn.turn(
                narrow, u.float(), w.float(), new_u.float(), new_w.float()
            )
            u, w = new_u, new_w
        x = skewed(d_out, d_in, gen) * scale
        expected, wide = step(wide, x, u, w, t)
        direction, narrow = step(narrow, x.float(), u.float(), w.float(), t)
        assert direction.dtype == torch.float32
        assert_close(direction, expected, FLOAT32)


@settings(max_examples=60, deadline=None)
@given(dims=dimensions, seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_direction_does_not_depend_on_the_gradients_scale(
    dims: tuple[int, int, int, int, int, int], seed: int, scale: float
) -> None:
    d_out, d_in, g, a = dims[:4]
    gen = generator(seed)
    u, w = orthonormal(d_out, g, gen), orthonormal(d_in, a, gen)
    one, other = fresh(dims[:4]), fresh(dims[:4])
    for t in range(1, 4):
        x = skewed(d_out, d_in, gen)
        direction = update(one, x, u, w, t, eps=0.0)
        scaled = update(other, x * scale, u, w, t, eps=0.0)
        assert_close(scaled, direction, 1e-6)


def test_half_precision_gradients_are_taken_in_the_states_dtype() -> None:
    gen = generator(13)
    u, w = orthonormal(6, 2, gen).float(), orthonormal(5, 2, gen).float()
    x = skewed(6, 5, gen).bfloat16()
    direction, state = step(fresh((6, 5, 2, 2), torch.float32), x, u, w, 1)
    expected, _ = step(fresh((6, 5, 2, 2), torch.float32), x.float(), u, w, 1)
    assert direction.dtype == state.momentum_OI.dtype == torch.float32
    assert torch.equal(direction, expected)


def test_a_zero_gradient_gives_a_zero_direction() -> None:
    u, w = torch.eye(6)[:, :2], torch.eye(5)[:, :2]
    direction, _ = step(fresh((6, 5, 2, 2), torch.float32), torch.zeros(6, 5), u, w, 1)
    assert torch.equal(direction, torch.zeros(6, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: four_block_state.init_state((5,), 1, 1), "not a matrix"),
        (lambda: four_block_state.init_state((5, 4), 6, 1), "rank_out 6 is not in 1..5"),
        (lambda: four_block_state.init_state((5, 4), 5, 0), "rank_in 0 is not in 1..4"),
        (lambda: four_block_state.init_state((5, 4), 1, 1, dtype=torch.bfloat16), "too narrow"),
        (lambda: _bad_update(t=0), "step 0"),
        (lambda: _bad_update(x=torch.zeros(4, 5)), "gradient has shape"),
        (lambda: _bad_update(u=torch.eye(4)[:, :2]), "output basis has shape"),
        (lambda: _bad_update(w=torch.eye(4)[:, :1]), "call turn"),
    ],
)
def test_bad_input_is_refused_by_name(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def _bad_update(
    t: int = 1, x: Tensor | None = None, u: Tensor | None = None, w: Tensor | None = None
) -> None:
    x = torch.zeros(5, 4) if x is None else x
    u = torch.eye(5)[:, :2] if u is None else u
    w = torch.eye(4)[:, :2] if w is None else w
    step(fresh((5, 4, 2, 2), torch.float32), x, u, w, t)
