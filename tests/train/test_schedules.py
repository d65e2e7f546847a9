"""Settings that are functions of the step: used at their step, checked, and resumed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from capture_harness import TokenNet
from oracles import relative_error
from test_preconditioner import backward, covered, factors, kfac, matrix_of, solved
from torch import Tensor

from distcurv.config import KfacConfig, SoapConfig
from distcurv.errors import ConfigError
from distcurv.optim import LowRankSOAP


def damping(step: int) -> float:
    return 0.1 * 2.0**-step


def interval(step: int) -> int:
    return 2 if step < 6 else 5


@pytest.mark.parametrize("own", [False, True])
def test_damping_follows_its_function(own: bool) -> None:
    model = TokenNet()
    expected_factors = factors(model)
    settings: dict[str, Any] = {"damping": damping}
    if own:
        settings = {"damping": 0.1, "overrides": [("head", {"damping": damping})]}
    with kfac(model, early_steps=1, preconditioner_upd_interval=50, **settings) as precond:
        for step in range(4):
            assert precond.damping == (0.1 if own else damping(step))
            backward(model)
            before = {name: matrix_of(module) for name, module in covered(model).items()}
            precond.step()
            for name, module in covered(model).items():
                A, G = expected_factors[name, "A"], expected_factors[name, "G"]
                now = damping(step) if name == "head" or not own else 0.1
                assert relative_error(matrix_of(module), solved(before[name], A, G, now)) < 1e-3


def test_the_learning_rate_of_kl_clip_follows_its_function() -> None:
    def grads(**settings: Any) -> list[Tensor]:
        model = TokenNet()
        model.load_state_dict(weights)
        found = []
        with kfac(model, kl_clip=1e-6, **settings) as precond:
            for seed in range(3):
                backward(model, seed=seed)
                precond.step(None if "lr" in settings else 0.1 * (seed + 1))
                found.append(model.head.weight.grad.clone())
        return found

    weights = TokenNet().state_dict()
    by_hand = grads()
    scheduled = grads(lr=lambda step: 0.1 * (step + 1))
    assert all(torch.equal(a, b) for a, b in zip(by_hand, scheduled, strict=True))


def test_intervals_follow_their_function_and_capture_runs_only_when_due() -> None:
    model = TokenNet()
    settings: dict[str, Any] = {
        "preconditioner_upd_interval": interval,
        "curvature_upd_interval": lambda step: interval(step) // 2,
        "early_steps": 0,
    }
    with kfac(model, **settings) as precond:
        due = []
        for step in range(17):
            if precond._pipeline.capture_due:
                due.append(step)
            backward(model, seed=step)
            precond.step()
        installs = sorted({record[0] for record in precond.install_log})
    # Cycles begin at 0, 2, 4, 6, 11, 16; of five steps every second one has a statistic.
    assert due == [0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 13, 15, 16]
    assert installs == [2, 4, 8, 13]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"damping": lambda s: 0.1 - 0.05 * s}, "damping at step 2 is 0.0: give a number"),
        ({"overrides": [("head", {"damping": lambda s: 1 - s})]}, "damping at step 1 is 0: give"),
        (
            {"lr": lambda s: None if s == 3 else 0.1, "kl_clip": 1.0},
            "lr at step 3 is None: give None or a number",
        ),
        (
            {"preconditioner_upd_interval": lambda s: 2 if s < 4 else 1.5, "early_steps": 0},
            "preconditioner_upd_interval at step 4 is 1.5: give an integer >= 1",
        ),
    ],
)
def test_a_value_that_cannot_work_is_told_with_its_step(
    settings: dict[str, Any], says: str
) -> None:
    model = TokenNet()
    merged: dict[str, Any] = {"curvature_upd_interval": None, **settings}
    with kfac(model, **merged) as precond, pytest.raises(ConfigError, match=says):
        for seed in range(5):
            backward(model, seed=seed)
            precond.step()


@pytest.mark.parametrize(
    "settings",
    [
        {"damping": lambda s: -1.0},
        {"lr": lambda s: 0.0},
        {"preconditioner_upd_interval": lambda s: 0},
        {"curvature_upd_interval": lambda s: 1000},
        {"damping": lambda s: torch.tensor(1.0)},
    ],
)
def test_step_0_is_checked_when_the_config_is_made(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"at step 0 is"):
        KfacConfig(**settings)


def test_the_deterministic_mode_and_dense_dampings_need_numbers() -> None:
    for field in ("preconditioner_upd_interval", "curvature_upd_interval"):
        with pytest.raises(ConfigError, match="install_delay is 3: an interval is a function"):
            SoapConfig(install_delay=3, **{field: lambda step: 4})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"damping is .*kind 'dense' is fixed when"):
        KfacConfig(kind="dense", damping=damping)


def test_damping_and_lr_may_be_set_to_numbers_and_functions() -> None:
    with kfac(TokenNet()) as precond:
        precond.damping = damping  # type: ignore[assignment]
        assert precond.damping == 0.1
        precond.damping = 0.25
        assert precond.damping == 0.25
        precond.lr = lambda step: 0.5 + step  # type: ignore[assignment]
        assert precond.lr == 0.5
        precond.lr = None
        assert precond.lr is None
        for bad in (0.0, float("nan"), "small", lambda step: -1.0):
            with pytest.raises(ConfigError, match=r"is .*: give .*a number > 0"):
                precond.damping = bad  # type: ignore[assignment]
            with pytest.raises(ConfigError, match=r"is .*: give .*a number > 0"):
                precond.lr = bad  # type: ignore[assignment]
        assert (precond.damping, precond.lr) == (0.25, None)


def test_a_resumed_run_goes_on_with_the_same_schedules() -> None:
    settings: dict[str, Any] = {
        "early_steps": 0,
        "damping": damping,
        "kl_clip": 1e-3,
        "lr": lambda step: 0.1 / (step + 1),
        # Cycles begin at 0, 1, 3, 4, 6, 7, 9, ...: all of the exchange happens in those steps.
        "preconditioner_upd_interval": lambda step: 1 + step % 3,
        "curvature_upd_interval": 1,
    }
    model, twin = TokenNet(), TokenNet()
    twin.load_state_dict(model.state_dict())

    def go(precond: Any, net: TokenNet, first: int, steps: int) -> list[Tensor]:
        grads = []
        for seed in range(first, first + steps):
            backward(net, seed=seed)
            precond.step()
            grads.append(net.head.weight.grad.clone())
        return grads

    with kfac(model, **settings) as first:
        go(first, model, 0, 5)
        state = first.state_dict()
        assert state["damping"] is None and state["lr"] is None
        expected = go(first, model, 5, 1)  # nothing is installed at step 5
        begun = len(first.install_log)
        go(first, model, 6, 6)
        installs = {record[0] for record in first.install_log[begun:]}
    assert installs == {6, 7, 9, 10}
    with kfac(twin, **settings) as second:
        second.load_state_dict(state)
        assert second.damping == damping(5)
        assert second.lr == 0.1 / 6
        got = go(second, twin, 5, 1)
        begun = len(second.install_log)
        go(second, twin, 6, 6)
        # What was in flight when the state was saved is lost: the first install comes later.
        assert {record[0] for record in second.install_log[begun:]} == {7, 9, 10}
        assert second.damping == damping(12)
    assert torch.equal(got[0], expected[0])


def test_a_number_of_a_loaded_state_does_not_replace_a_function(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with kfac(TokenNet(), damping=0.25) as first:
        state = first.state_dict()
    assert state["damping"] == 0.25
    caplog.set_level(logging.WARNING, "distcurv.train")
    with kfac(TokenNet(), damping=damping) as second:
        second.load_state_dict(state)
        assert second.damping == 0.1
    assert "the number 0.25 of the loaded state is not used" in caplog.text
    with kfac(TokenNet(), damping=0.5) as third:
        third.load_state_dict(state)
        assert third.damping == 0.25


def test_lowrank_soap_takes_intervals_as_functions() -> None:
    model = torch.nn.Linear(6, 4)
    settings: dict[str, Any] = {"preconditioner_upd_interval": interval, "early_steps": 0}
    with LowRankSOAP(model, rank=2, workers="inline", **settings) as optimizer:
        for seed in range(14):
            optimizer.zero_grad()
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
            model(inputs).square().mean().backward()
            optimizer.step()
        installs = [record[0] for record in optimizer.install_log]
    assert installs == [2, 4, 8, 13]
