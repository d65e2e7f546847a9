"""EMA shares against the explicit weighted sum over single steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import averaged

from distcurv.curvature.ema import ema_weights
from distcurv.errors import ConfigError


@given(
    decay=st.sampled_from([0.0, 0.5, 0.95, 0.999]),
    arrivals=st.lists(st.tuples(st.integers(0, 7), st.floats(-5, 5)), min_size=1, max_size=6),
)
def test_folding_arrivals_equals_the_weighted_sum(
    decay: float, arrivals: list[tuple[int, float]]
) -> None:
    value = torch.zeros((), dtype=torch.float64)
    weight = torch.zeros((), dtype=torch.float64)
    for n, mean in arrivals:
        shares = ema_weights(decay, torch.tensor(n), weight)
        value = shares.old_share * value + shares.new_share * mean
        weight = shares.weight
    if sum(n for n, _ in arrivals) == 0:
        assert value.item() == 0.0
        assert weight.item() == 0.0
        return
    wanted = averaged(decay, [(n, torch.tensor(mean)) for n, mean in arrivals])
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12, abs=1e-6)
    steps = sum(n for n, _ in arrivals)
    assert weight.item() == pytest.approx(1.0 - decay**steps, rel=1e-12)


def test_nothing_changes_without_steps() -> None:
    shares = ema_weights(0.9, torch.tensor([0.0, 3.0]), torch.tensor([0.4, 0.4]))
    assert shares.old_share[0].item() == 1.0
    assert shares.new_share[0].item() == 0.0
    assert shares.weight[0].item() == torch.tensor(0.4).double().item()
    assert (shares.old_share + shares.new_share).tolist() == pytest.approx([1.0, 1.0], abs=1e-15)
    assert shares.weight[1].item() == pytest.approx(0.9**3 * 0.4 + 1 - 0.9**3, abs=1e-7)


def test_first_statistic_counts_fully() -> None:
    shares = ema_weights(0.95, torch.tensor(4), torch.tensor(0.0))
    assert shares.old_share.item() == 0.0
    assert shares.new_share.item() == 1.0


def test_decay_one_forgets_nothing() -> None:
    weight = mean = torch.tensor(0.0, dtype=torch.float64)
    for n, value in ((2, 3.0), (0, 100.0), (1, 9.0)):
        shares = ema_weights(1.0, torch.tensor(n), weight)
        mean, weight = shares.old_share * mean + shares.new_share * value, shares.weight
    assert (weight.item(), mean.item()) == (3.0, 5.0)


@pytest.mark.parametrize("decay", [1.1, -0.1, float("nan")])
def test_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="0 <= decay <= 1"):
        ema_weights(decay, torch.tensor(1), torch.tensor(0.0))
