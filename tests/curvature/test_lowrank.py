"""What the low-rank kind promises beyond the contract of kinds.

float32 throughout: 1e-5 on matrices, 1e-6 on orthogonality.
"""

from __future__ import annotations

import pytest
import torch
from kind_cases import (
    DECAY,
    DIM_A,
    batched,
    low_rank_spec,
    mean_of,
    part,
    rows_of,
    statistic_of,
)
from oracles import averaged, generator, orthogonality_error, relative_error

from distcurv.curvature.ema import ema_weights
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.kinds.lowrank import side_estimate
from distcurv.curvature.lowrank import refresh_side, turned_basis
from distcurv.curvature.spec import Tensors


@pytest.mark.parametrize("encoding", ["sketch", "dense"])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_trace_and_diagonal_are_exact(rank: int, encoding: str) -> None:
    kind = KINDS["lowrank"]
    for tail in ("isotropic", "diagonal"):
        spec = low_rank_spec(rank, tail, encoding)
        published = batched(kind.start(spec, seed=0))
        state = kind.seed(spec, published)
        arrivals: dict[str, list[tuple[int, torch.Tensor]]] = {"A": [], "G": []}
        for seed in range(8):
            rows = rows_of(seed)
            refreshed = kind.refresh(spec, state, statistic_of(spec, rows, published, 1), published)
            state, published = refreshed.state, refreshed.published
            for name in arrivals:
                arrivals[name].append((1, mean_of(rows[name])))
        for name, side in spec.named_sides():
            estimate = side_estimate(side, name, part(published, 0))
            factor = averaged(DECAY, arrivals[name])
            got = estimate.dense()[0].double()
            assert got.trace().item() == pytest.approx(factor.trace().item(), rel=1e-5)
            if tail == "diagonal":
                assert relative_error(got.diagonal(), factor.diagonal()) < 1e-5
            assert orthogonality_error(estimate.U_dr[0]) < 1e-6
        assert 0.0 < refreshed.uncaptured.item() < 1.0
        assert 0.0 < refreshed.innovation.item() < 3.0


def test_two_passes_find_more_than_one() -> None:
    kind = KINDS["lowrank"]
    spec = low_rank_spec(2, "none", "sketch")
    start = batched(kind.start(spec, seed=0))
    rows = rows_of(0)
    once = kind.refresh(spec, kind.seed(spec, start), statistic_of(spec, rows, start, 1), start)
    turned = turned_basis(spec, start, statistic_of(spec, rows, start, 1))
    again = statistic_of(spec, rows, turned, 1)
    twice = kind.refresh(spec, kind.seed(spec, start), again, turned)
    assert twice.uncaptured.item() < once.uncaptured.item()
    assert twice.published["A.weight"].item() == once.published["A.weight"].item()
    best = torch.linalg.eigvalsh(mean_of(rows["A"])).flip(0)[:2].sum().item()
    assert best * 0.97 < twice.published["A.lam"].sum().item() <= best * (1 + 1e-5)


def test_basis_older_than_the_state_is_folded_rightly() -> None:
    # The statistic was taken against version 0 while the state moved on: at full rank exact.
    kind = KINDS["lowrank"]
    spec = low_rank_spec(DIM_A, "isotropic", "sketch")
    old = batched(kind.start(spec, seed=0))
    first, second = rows_of(0), rows_of(1)
    late = statistic_of(spec, second, old, 1)
    state = kind.refresh(spec, kind.seed(spec, old), statistic_of(spec, first, old, 1), old).state
    got = kind.refresh(spec, state, late, old).published
    for name, side in spec.named_sides():
        wanted = averaged(DECAY, [(1, mean_of(first[name])), (1, mean_of(second[name]))])
        estimate = side_estimate(side, name, got)
        assert relative_error(estimate.dense()[0], wanted) < 1e-5


def test_long_run_follows_a_moving_factor_and_stays_orthonormal() -> None:
    kind = KINDS["lowrank"]
    spec = low_rank_spec(3, "diagonal", "sketch")
    published = batched(kind.start(spec, seed=0))
    state = kind.seed(spec, published)
    turn = torch.linalg.matrix_exp(
        0.02 * (lambda m: m - m.mT)(torch.randn(DIM_A, DIM_A, generator=generator(0)))
    )
    frame = torch.eye(DIM_A)
    arrivals = []
    for step in range(300):
        frame = frame @ turn
        rows = rows_of(step)
        rows["A"] = rows["A"] @ frame
        arrivals.append((1, mean_of(rows["A"])))
        statistic = statistic_of(spec, rows, published, 1)
        refreshed = kind.refresh(spec, state, statistic, published)
        state, published = refreshed.state, refreshed.published
    assert orthogonality_error(published["A.U"][0]) < 1e-6
    factor = averaged(DECAY, arrivals)
    best = torch.linalg.eigvalsh(factor).flip(0)[:3].sum().item()
    assert 0.9 * best < published["A.lam"].sum().item() <= best * (1 + 1e-5)
    estimate = side_estimate(spec.sides[0], "A", part(published, 0)).dense()[0]
    assert relative_error(estimate.diagonal(), factor.diagonal()) < 1e-5


@pytest.mark.parametrize("encoding", ["sketch", "dense"])
@pytest.mark.parametrize("tail", ["none", "isotropic", "diagonal"])
def test_one_batched_call_equals_single_calls(tail: str, encoding: str) -> None:
    # On the CPU the kind goes block by block; this is the call that a GPU gets.
    kind, spec = KINDS["lowrank"], low_rank_spec(3, tail, encoding)
    singles: list[tuple[Tensors, Tensors, Tensors]] = []
    for i in range(3):
        published = batched(kind.start(spec, seed=i))
        state = kind.seed(spec, published)
        for seed in range(i):  # block 0 holds nothing yet, the others do
            statistic = statistic_of(spec, rows_of(seed), published, 1)
            refreshed = kind.refresh(spec, state, statistic, published)
            state, published = refreshed.state, refreshed.published
        singles.append((state, statistic_of(spec, rows_of(5 + i), published, i + 1), published))

    def joined(parts: list[Tensors]) -> Tensors:
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    state, statistic, basis = (joined(list(parts)) for parts in zip(*singles, strict=True))
    for name, side in spec.named_sides():
        weight = state[f"{name}.weight"]
        got = refresh_side(
            side,
            side_estimate(side, name, state),
            weight > 0,
            own(statistic, name),
            basis[f"{name}.U"],
            ema_weights(DECAY, statistic["steps"], weight),
        )
        for i, (one_state, one_statistic, one_basis) in enumerate(singles):
            one = kind.refresh(spec, one_state, one_statistic, one_basis).published
            wanted = side_estimate(side, name, one).dense()[0]
            assert relative_error(got.estimate.dense()[i], wanted) < 1e-5
            assert (got.innovation[i].item() == -1.0) == (i == 0)


def own(statistic: Tensors, name: str) -> Tensors:
    return {
        key.removeprefix(f"{name}."): value
        for key, value in statistic.items()
        if key.startswith(f"{name}.")
    }
