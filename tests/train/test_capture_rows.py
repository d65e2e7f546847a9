"""Capture that reads some rows of a call only: unbiased, reproducible, and nothing else changes.

Exactness over all draws is tested with the layers; here draws come from seed, step and call.
"""

from __future__ import annotations

import pytest
import torch
from capture_harness import (
    ConvNet,
    Harness,
    TokenNet,
    assert_same_totals,
    batch,
    cross_entropy,
    oracle_factors,
)
from test_capture_mc import EveryClass, exact_output_factors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from distcurv.config import KfacConfig
from distcurv.errors import ConfigError
from distcurv.train.preconditioner import Preconditioner
from distcurv.train.rows import StepRows

BIG = 10**6


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind(True).double()


def step(harness: Harness, model: nn.Module, data: tuple[Tensor, Tensor], number: int) -> None:
    inputs, targets = data
    harness.capture.arm(harness.bases, harness.sink, number)
    cross_entropy("mean")(model(inputs), targets).backward()
    harness.capture.finish()


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
@pytest.mark.parametrize("encoding", ["sketch", "dense"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [ConvNet, TokenNet])
def test_enough_rows_give_what_all_rows_give(
    kind: type[nn.Module], weight_sharing: str, encoding: str, fisher_type: str
) -> None:
    model = make(kind)
    inputs, targets = batch(model, 8)
    totals = []
    for max_rows in (None, BIG):
        torch.manual_seed(0)
        harness = Harness(
            model,
            encoding=encoding,
            weight_sharing=weight_sharing,
            fisher_type=fisher_type,
            max_rows=max_rows,
        )
        with harness.capture.armed(harness.bases, harness.sink):
            for x, y in zip(inputs.chunk(2), targets.chunk(2), strict=True):
                logits = model(x)
                if fisher_type == "mc":
                    for label in range(4):
                        harness.capture.sample(logits, EveryClass(label))
                cross_entropy("mean")(logits, y).backward()
        totals.append(harness.totals)
    assert_same_totals(*totals, 1e-6)


@pytest.mark.parametrize("kind", [ConvNet, TokenNet])
def test_the_mean_over_steps_tends_to_the_factor_of_all_rows(kind: type[nn.Module]) -> None:
    """400 steps with 6 of the rows each; within 5 standard errors of the per-sample oracle."""
    model = make(kind)
    data = batch(model, 8)
    harness = Harness(model, max_rows=6, seed=1)
    expected = oracle_factors(model, harness.modules, *data, cross_entropy("mean"))
    draws: dict[tuple[str, str], list[Tensor]] = {key: [] for key in expected}
    for number in range(400):
        harness.totals.clear()
        step(harness, model, data, number)
        for name, side in expected:
            draws[name, side].append(harness.factor(name, side))
        for name in harness.modules:  # the counts are those of all rows
            positions = {"conv": 9, "first": 3}.get(name, 3 if kind is TokenNet else 1)
            assert harness.count(name, "A") == 8 * positions
            assert harness.count(name, "G") == 8
    for key, factor in expected.items():
        stacked = torch.stack(draws[key]).double()
        error = (stacked.mean(0) - factor).abs()
        standard_error = stacked.std(0) / len(stacked) ** 0.5
        assert (error <= 5 * standard_error + 1e-6 * factor.abs().max()).all()
        # Not so wide that anything passes: a forgotten weight would be far outside.
        assert 5 * standard_error.trace() < 0.5 * factor.trace()


def test_monte_carlo_with_few_rows_is_unbiased() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 4)
    exact = exact_output_factors(model, inputs)["first"]
    harness = Harness(model, fisher_type="mc", max_rows=5)
    draws = []
    for number in range(150):
        harness.totals.clear()
        harness.capture.arm(harness.bases, harness.sink, number)
        logits = model(inputs)
        for label in range(4):
            harness.capture.sample(logits, EveryClass(label))
        cross_entropy("mean")(logits, targets).backward()
        harness.capture.finish()
        draws.append(harness.factor("first", "G"))
    stacked = torch.stack(draws)
    standard_error = stacked.std(0) / len(draws) ** 0.5
    assert ((stacked.mean(0) - exact).abs() <= 5 * standard_error + 1e-6).all()
    assert 5 * standard_error.trace() < 0.5 * exact.trace()


def test_draws_depend_on_seed_step_and_micro_batch_alone() -> None:
    model = make(ConvNet)
    data = batch(model, 8)

    def totals(seed: int, steps: list[int]) -> dict[str, dict[str, Tensor]]:
        torch.manual_seed(len(steps))  # the global generator has no say
        harness = Harness(model, max_rows=7, seed=seed)
        for number in steps:
            harness.totals.clear()
            step(harness, model, data, number)
        return harness.totals

    assert_same_totals(totals(5, [4]), totals(5, [1, 2, 4]), 0.0)  # as after a restart
    for other in (totals(5, [5]), totals(6, [4])):
        with pytest.raises(AssertionError):
            assert_same_totals(totals(5, [4]), other, 0.0)
    of_calls = [StepRows(7, 5, 4).of_call(call) for call in range(20)]
    assert len({sampler.number for sampler in of_calls if sampler is not None}) == 20
    assert StepRows(None, 5, 4).of_call(0) is None


def test_micro_batches_of_one_step_draw_for_themselves() -> None:
    """The same micro-batch twice, with half of its samples drawn: both halves are seen."""
    model = nn.Sequential(nn.Linear(2, 2))
    inputs = torch.arange(8.0).reshape(4, 2)
    seen = set()
    for number in range(12):
        harness = Harness(model, max_rows=2)
        harness.capture.arm(harness.bases, harness.sink, number)
        rows = []
        for _ in range(2):
            before = harness.totals.get("0", {}).get("A.packed", torch.zeros(6))
            model(inputs).sum().backward()
            rows.append(tuple((harness.totals["0"]["A.packed"] - before).tolist()))
        harness.capture.finish()
        seen.add(rows[0] == rows[1])
    assert seen == {True, False}


def test_gradients_and_global_generator_are_untouched() -> None:
    model = ConvNet()
    inputs, targets = batch(model, 5)

    def run() -> list[Tensor]:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = run()
    harness = Harness(model, encoding="sketch", max_rows=3)
    state = torch.get_rng_state()
    with harness.capture.armed(harness.bases, harness.sink):
        during = run()
    assert len(before) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_what_arrived_before_a_backward_failed_is_delivered_at_the_end() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            raise ZeroDivisionError

    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    harness = Harness(nn.Sequential(first, second), max_rows=2)
    harness.capture.arm(harness.bases, harness.sink)
    out = second(Fails.apply(first(torch.randn(4, 3))))
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    second(first(torch.randn(4, 3))).sum().backward()
    assert harness.capture.finish() == frozenset()
    assert harness.deliveries == {"0": 1, "1": 2}


def test_non_finite_rows_contribute_zeros_and_are_counted() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 6)
    harness = Harness(model, encoding="sketch", max_rows=4)
    step(harness, model, (inputs * torch.nan, targets), 0)
    assert all(not tensor.any() for t in harness.totals.values() for tensor in t.values())
    assert harness.capture.nonfinite == 2


@pytest.mark.parametrize("max_rows", ["auto", None])
def test_steps_without_statistics_run_without_any_hook(max_rows: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    config = KfacConfig(
        rank=2, preconditioner_upd_interval=4, curvature_upd_interval=4, early_steps=0,
        max_rows=max_rows,
    )  # fmt: skip
    hooked: list[tuple[bool, bool]] = []
    with Preconditioner(model, config, workers=0) as precond:
        for _ in range(9):
            due = precond._pipeline.capture_due
            hidden = model[0](torch.randn(4, 6))
            hooks = bool(torch_module._global_forward_hooks), bool(hidden._backward_hooks)
            hooked.append(hooks)
            assert hooks == (due, due)
            model[2](hidden.tanh()).square().mean().backward()
            precond.step()
            model.zero_grad()
    assert {True, False} == {forward for forward, _ in hooked}
    assert not torch_module._global_forward_hooks


def test_a_bad_number_of_rows_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="max_rows is 0"):
        Harness(make(TokenNet), max_rows=0)
