"""What the dense kind promises beyond the contract of kinds."""

from __future__ import annotations

import pytest
import torch
from kind_cases import (
    DAMPING,
    DECAY,
    DIM_A,
    DIM_G,
    batched,
    dense_spec,
    mean_of,
    rows_of,
    statistic_of,
)
from oracles import relative_error, symmetric

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.curvature.statistics import guard_finite
from distcurv.errors import NumericsError, ShapeError


def test_dense_state_is_the_average_and_needs_dense_statistics() -> None:
    kind, spec = KINDS["dense"], dense_spec()
    published = batched(kind.start(spec, seed=0))
    state = kind.seed(spec, published)
    assert state["A.packed"].abs().max().item() == 0.0
    rows = rows_of(0)
    state = kind.refresh(spec, state, statistic_of(spec, rows, published, 1), published).state
    assert relative_error(symmetric(state["A.packed"][0], DIM_A), mean_of(rows["A"])) < 1e-6
    with pytest.raises(ShapeError, match="needs 'dense'"):
        kind.statistic_layout(
            BlockSpec("b", "dense", (SideSpec(3, 1, "none", "sketch"),), DECAY, DAMPING)
        )


def test_dense_without_damping_refuses_a_singular_factor() -> None:
    sides = (SideSpec(DIM_A, 1, "none", "dense"), SideSpec(DIM_G, 1, "none", "dense"))
    spec = BlockSpec("b", "dense", sides, DECAY, damping=0.0)
    kind = KINDS["dense"]
    published = batched(kind.start(spec, seed=0))
    rows = {"A": torch.ones(20, DIM_A), "G": torch.ones(20, DIM_G)}
    statistic = guard_finite(statistic_of(spec, rows, published, 1))
    with pytest.raises(NumericsError, match="raise the damping"):
        kind.refresh(spec, kind.seed(spec, published), statistic, published)


def test_seeding_is_as_accurate_as_documented() -> None:
    kind, spec = KINDS["dense"], dense_spec(relative=True)
    published = batched(kind.start(spec, seed=0))
    rows = rows_of(0)
    refreshed = kind.refresh(
        spec, kind.seed(spec, published), statistic_of(spec, rows, published, 1), published
    )
    seeded = kind.seed(spec, refreshed.published)
    for name in ("A", "G"):
        factor = mean_of(rows[name])
        damping = refreshed.published[f"{name}.damping"].item()
        lam = torch.linalg.eigvalsh(factor) + damping
        bound = 2e-7 * (lam[-1] / lam[0] * lam[-1]).item()
        error = symmetric(seeded[f"{name}.packed"][0], len(factor)) - factor
        assert torch.linalg.matrix_norm(error, 2).item() < bound
