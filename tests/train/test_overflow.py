"""AMP's loss scale: a step that overflows anywhere leaves no trace in any block, and is counted.

What a run with such a step must equal is the run in which nothing was backwarded there.  Loss
scales are powers of two, so scaling rounds nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_harness import TokenNet, batch, cross_entropy
from torch import Tensor, nn

from distcurv import KfacConfig, LowRankSOAP, Preconditioner
from distcurv.errors import ConfigError
from distcurv.train.overflow import HeldStatistics

AT_ONCE: dict[str, Any] = {
    "rank": 2,
    "preconditioner_upd_interval": 3,
    "curvature_upd_interval": 1,
    "early_steps": 4,
    "early_interval": 2,
    "install_delay": 0,
}
STEPS, OVERFLOWS = 9, (1, 4, 5)


class Leaking(TokenNet):
    """Its first layer alone meets the overflow: the head's statistics and gradients are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * self.factor)
        return self.head(hidden)


def made() -> Leaking:
    torch.manual_seed(0)
    return Leaking()


def backward(model: nn.Module, scaler: torch.amp.GradScaler, seed: int, parts: int = 1) -> None:
    inputs, targets = batch(model, 12, seed)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        loss = cross_entropy("mean")(model(x), y) / parts
        scaler.scale(loss).backward()


def installed(door: Preconditioner | LowRankSOAP) -> list[dict[str, Tensor]]:
    pipeline = door._pipeline
    assert pipeline is not None
    return [{k: v.clone() for k, v in i.tensors.items()} for i in pipeline.installed]


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return all(
        torch.equal(value, b[key])
        for a, b in zip(left, right, strict=True)
        for key, value in a.items()
    )


def kfac_run(overflowing: bool) -> tuple[list[dict[str, Tensor]], list[Tensor], int]:
    model = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    config = KfacConfig(damping=0.1, **AT_ONCE)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with Preconditioner(model, config, "inline", grad_scaler=scaler) as precond:
        for step in range(STEPS):
            base.zero_grad()
            bad = step in OVERFLOWS
            if overflowing or not bad:
                model.factor = torch.inf if bad else 1.0
                backward(model, scaler, step)
                scaler.unscale_(base)
            precond.step()
            if overflowing or not bad:
                scaler.step(base)
                scaler.update()
        assert scaler.get_scale() < 2.0**14
        counted = precond.metrics()["statistics_nonfinite"]
        return installed(precond), [p.detach().clone() for p in model.parameters()], int(counted)


def test_an_overflowed_step_of_a_preconditioner_contributes_nothing_and_is_counted() -> None:
    versions, params, counted = kfac_run(overflowing=True)
    expected_versions, expected_params, none = kfac_run(overflowing=False)
    assert same(versions, expected_versions)
    assert all(torch.equal(a, b) for a, b in zip(params, expected_params, strict=True))
    # Of each such step: the first layer's, which is not finite, and the head's, which is.
    assert (counted, none) == (2 * len(OVERFLOWS), 0)


@pytest.mark.parametrize(
    ("source", "parts"), [("activations", 1), ("activations", 2), ("gradient", 1)]
)
def test_a_step_that_the_scaler_leaves_out_contributes_nothing(source: str, parts: int) -> None:
    runs = []
    for overflowing in (True, False):
        model = made()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = LowRankSOAP(
            model,
            lr=0.01,
            source=source,
            workers="inline",
            grad_scaler=scaler,
            accumulation=parts,
            **AT_ONCE,
        )
        with optimizer:
            for step in range(STEPS):
                bad = step in OVERFLOWS
                if bad and not overflowing:
                    continue
                model.factor = torch.inf if bad else 1.0
                optimizer.zero_grad()
                backward(model, scaler, step, parts)
                scaler.step(optimizer)
                scaler.update()
            steps = optimizer.metrics()["step"]
            runs.append(
                (
                    installed(optimizer),
                    [p.detach().clone() for p in model.parameters()],
                    optimizer.metrics()["statistics_nonfinite"],
                    steps,
                )
            )
    (versions, params, counted, steps), (expected, expected_params, none, expected_steps) = runs
    assert steps == expected_steps
    assert same(versions, expected)
    assert all(torch.equal(a, b) for a, b in zip(params, expected_params, strict=True))
    assert none == 0
    # The gradient source never sees such a step.  Of the head one statistic a step falls, and of
    # the first layer each backward is not finite.
    assert counted == (len(OVERFLOWS) * (parts + 1) if source == "activations" else 0)


def test_without_a_scaler_or_with_one_switched_off_nothing_is_held_back() -> None:
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model = made()
        with Preconditioner(model, KfacConfig(**AT_ONCE), "inline", grad_scaler=scaler) as precond:
            assert precond._source._held is None
            backward(model, scaler or torch.amp.GradScaler("cpu", enabled=False), 0)
            precond.step()
            assert precond.metrics()["version"] == 1


def test_held_statistics_of_another_scale_fall() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    held = HeldStatistics(scaler)

    def statistic(value: float) -> dict[str, Tensor]:
        return {"F.diag": torch.full((3,), value), "F.count": torch.tensor(2.0)}

    held.add(0, statistic(1.0))
    held.add(0, statistic(2.0))
    held.add(1, statistic(5.0))
    scaler.update(4.0)
    held.add(0, statistic(7.0))
    taken = held.take(None)
    assert torch.equal(taken[0][0]["F.diag"], torch.full((3,), 7.0))
    assert taken[0][0]["F.count"] == 2
    assert taken[0][1] == 1
    assert not taken[1][0]["F.diag"].any()
    assert taken[1][1] == 0
    assert held.dropped == 2
    assert not held.take(None)
    held.add(0, statistic(3.0))
    held.forget()
    assert not held.take(None)
    held.add(0, statistic(3.0))
    assert held.take([torch.ones(2), torch.tensor([1.0, torch.nan])])[0][1] == 0
    assert held.dropped == 3


@pytest.mark.parametrize("accumulation", [0, 1.5])
def test_accumulation_is_checked(accumulation: Any) -> None:
    with pytest.raises(ConfigError, match=r"SoapConfig\.accumulation"):
        LowRankSOAP(made(), accumulation=accumulation)
