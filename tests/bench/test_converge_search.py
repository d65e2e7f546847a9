"""The search for a learning rate: the same budget for all, and it finds the bottom of a valley."""

from __future__ import annotations

import math

import pytest

from distcurv.bench.converge_peers import MAKERS
from distcurv.bench.converge_search import (
    STARTS,
    best,
    learning_rate,
    loss_of,
    next_points,
    tried_so_far,
)


def search(start: int, budget: int, bottom: float, brink: float = math.inf) -> dict[int, float]:
    """Losses of a parabola over k with its bottom at ``bottom``, infinite from ``brink`` on."""
    tried: dict[int, float] = {}
    while points := next_points(start, budget, tried):
        tried |= {k: math.inf if k >= brink else (k - bottom) ** 2 for k in points}
    return tried


def test_every_method_has_a_start() -> None:
    assert set(STARTS) == set(MAKERS)


def test_the_lattice() -> None:
    assert learning_rate(0) == 1e-3
    assert learning_rate(2) == 2.25e-3
    assert learning_rate(-1) == 6.67e-4


@pytest.mark.parametrize("off", range(-7, 8))
def test_seven_points_find_the_bottom(off: int) -> None:
    tried = search(3, 7, 3 + off + 0.1)
    assert len(tried) == 7
    assert best(tried) == 3 + off
    if abs(off) < 7:
        assert {2 + off, 4 + off} <= set(tried)


@pytest.mark.parametrize("budget", range(1, 12))
def test_the_budget_is_kept(budget: int) -> None:
    for bottom in (-20.0, 0.2, 20.0):
        assert len(search(0, budget, bottom)) == budget


def test_where_all_diverge_lower_rates_are_tried() -> None:
    tried = search(0, 7, 0, brink=-6)
    assert min(tried) == -7 and best(tried) == -7


def test_the_brink_is_no_obstacle() -> None:
    assert best(search(0, 7, 1.9, brink=1)) == 0


def test_known_losses_are_taken_and_nothing_more() -> None:
    losses = search(0, 7, 1.1)
    assert tried_so_far(0, 7, losses.get) == losses
    first = {k: losses[k] for k in (0, 4)}
    assert tried_so_far(0, 7, first.get) == first
    assert next_points(0, 7, first) == [-4]
    assert tried_so_far(0, 7, {}.get) == {}


def test_a_divergence_ranks_last() -> None:
    assert loss_of(None) is None
    assert loss_of({"final": None}) == math.inf
    assert loss_of({"final": 0.5}) == 0.5
