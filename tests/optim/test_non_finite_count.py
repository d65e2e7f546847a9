"""LowRankSOAP: gradients that give no statistic are counted, not passed over in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcurv.optim import LowRankSOAP


@pytest.mark.parametrize("source", ["gradient", "activations"])
def test_what_was_not_finite_is_counted(source: str) -> None:
    model = nn.Linear(6, 4)
    settings = {"curvature_upd_interval": 1, "rank": 2, "lr": 0.0}
    with LowRankSOAP(model, source=source, workers="inline", **settings) as optimizer:
        for scale in (1.0, float("inf"), float("nan"), 1.0):
            optimizer.zero_grad()
            (scale * model(torch.ones(3, 6)).sum()).backward()
            optimizer.step()
            model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
        assert optimizer.metrics()["statistics_nonfinite"] == 2


def test_squares_that_overflow_are_counted_although_the_gradient_is_finite() -> None:
    model = nn.Linear(6, 4)
    with LowRankSOAP(model, workers="inline", rank=2, curvature_upd_interval=1) as optimizer:
        model.weight.grad = torch.full_like(model.weight, 1e30)
        optimizer.step()
        assert optimizer.metrics()["statistics_nonfinite"] == 1
