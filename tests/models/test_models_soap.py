"""LowRankSOAP on each off-the-shelf model, in process."""

from __future__ import annotations

import math

import pytest
from model_zoo import MAKERS, loss_of, make

from distcurv import LowRankSOAP

STEPS = 8


@pytest.mark.parametrize("source", ["gradient", "activations"])
@pytest.mark.parametrize("name", list(MAKERS))
def test_the_loss_falls(name: str, source: str) -> None:
    model, batch = make(name)
    losses = []
    with LowRankSOAP(
        model, lr=0.01, rank=8, source=source, workers="inline", early_interval=1
    ) as optimizer:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert {record[1] for record in optimizer.install_log} == set(
            range(len(optimizer.block_names))
        )
        assert optimizer.metrics()["statistics_nonfinite"] == 0
    assert math.isfinite(losses[-1])
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2]), losses
