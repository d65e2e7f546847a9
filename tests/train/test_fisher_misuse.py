"""What the Fisher types mc and exact refuse, with what to do; and through `Preconditioner`."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from capture_harness import Harness, TokenNet, batch
from loss_cases import CASES
from oracles import relative_error
from test_capture_mc import EveryClass, exact_output_factors
from test_preconditioner import AT_ONCE, covered, factors, matrix_of, solved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distcurv.config import KfacConfig
from distcurv.errors import CaptureError, ConfigError
from distcurv.train.likelihoods import Categorical
from distcurv.train.preconditioner import Preconditioner


def make() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = TokenNet().double()
    return model, *batch(model, 5)


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_a_reentrant_checkpoint_amid_the_model_is_refused_by_name(fisher_type: str) -> None:
    """A captured layer before it: torch does not let a gradient through for its edge alone."""
    model, inputs, _ = make()
    harness = Harness(model, fisher_type=fisher_type)
    harness.arm()
    logits = checkpoint(model.head, model.first(inputs), use_reentrant=True)
    with pytest.raises(CaptureError, match=r"checkpoint with use_reentrant=False"):
        harness.capture.sample(logits, "categorical")
    harness.capture.disarm()


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_a_backward_without_sample_is_an_error(fisher_type: str) -> None:
    model, inputs, targets = make()
    harness = Harness(model, fisher_type=fisher_type)
    harness.arm()
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    with pytest.raises(CaptureError, match=rf"fisher_type='{fisher_type}'.*first, head"):
        harness.capture.finish()


def test_a_likelihood_must_know_what_exact_and_masks_need() -> None:
    model, inputs, targets = make()

    class Counted(EveryClass):
        def count(self, logits: Tensor, targets: Tensor | None) -> int:
            return 15

        def weights(self, logits: Tensor, targets: Tensor | None) -> None:
            return None

    exact = Harness(model, fisher_type="exact")
    logits = model(inputs)
    with pytest.raises(ConfigError, match=r"EveryClass the methods count\("):
        exact.capture.sample(logits, EveryClass(0))
    with pytest.raises(ConfigError, match=r"Counted a method hessian_factors\(logits\)"):
        exact.capture.sample(logits, Counted(0))
    drawn = Harness(model, fisher_type="mc")
    with drawn.capture.armed(drawn.bases, drawn.sink):
        logits = model(inputs)
        with pytest.raises(ConfigError, match=r"targets need .* EveryClass the methods"):
            drawn.capture.sample(logits, EveryClass(0), targets=targets)


def test_tokens_flattened_into_samples_are_refused_by_exact() -> None:
    """Products between the tokens of a sample would come in."""
    model, inputs, _ = make()
    harness = Harness(model, fisher_type="exact")
    harness.arm()
    with pytest.raises(CaptureError, match=r"shape \(15, 4\).*\[N, T, C\]"):
        harness.capture.sample(model(inputs).flatten(0, 1), "categorical")
    harness.capture.disarm()


def test_exact_does_not_read_the_number_of_samples_but_refuses_a_bad_one() -> None:
    model, inputs, targets = make()
    harness = Harness(model, fisher_type="exact")
    with harness.capture.armed(harness.bases, harness.sink):
        logits = model(inputs)
        with pytest.raises(ConfigError, match="n_samples is 0"):
            harness.capture.sample(logits, "categorical", 0)
        harness.capture.sample(logits, "categorical", 7)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, factor in exact_output_factors(model, inputs).items():
        harness.assert_factor(name, "G", factor, 1e-6)


def test_many_passes_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2001, bias=False))
    harness = Harness(model, fisher_type="exact", encoding="sketch")

    class Cheap(Categorical):
        def hessian_factors(self, logits: Tensor):  # type: ignore[no-untyped-def]
            yield torch.zeros_like(logits)

    harness.arm()
    with caplog.at_level(logging.WARNING, "distcurv.train"):
        for _ in range(2):
            harness.capture.sample(model(torch.ones(1, 2)), Cheap())
    assert [r.getMessage().split(" for")[0] for r in caplog.records] == [
        "fisher_type='exact' takes 2001 backward passes"
    ]
    harness.capture.disarm()


def test_no_gradient_is_touched_and_no_number_is_drawn_by_exact() -> None:
    model, inputs, targets = make()
    harness = Harness(model, fisher_type="exact")
    state = torch.get_rng_state()
    with harness.capture.armed(harness.bases, harness.sink):
        logits = model(inputs)
        harness.capture.sample(logits, "categorical")
        assert all(p.grad is None for p in model.parameters())
        assert not harness.totals
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert torch.equal(state, torch.get_rng_state())
    assert set(harness.deliveries.values()) == {1}


# -- through the preconditioner -----------------------------------------------------------


def kfac(model: nn.Module, **settings: object) -> Preconditioner:
    config = KfacConfig(**AT_ONCE, early_steps=1000, rank=1000, damping=0.1, **settings)  # type: ignore[arg-type]
    return Preconditioner(model, config, workers="inline")


def stepped(
    model: nn.Module, fisher_type: str, told: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients before and after a step on a batch of tokens, of which some are masked."""
    inputs, targets = batch(model, 4)
    targets[0, 1:] = -100
    with kfac(model, fisher_type=fisher_type) as precond:
        logits = model(inputs)
        if told:
            precond.count_terms((targets != -100).sum())
        else:
            precond.observe_loss(logits, targets, "categorical")
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        before = {name: matrix_of(module) for name, module in covered(model).items()}
        precond.step()
    return before, {name: matrix_of(module) for name, module in covered(model).items()}


@pytest.mark.parametrize("told", [True, False])
def test_an_empirical_step_is_the_inverse_over_the_unmasked_tokens(told: bool) -> None:
    torch.manual_seed(0)
    model = TokenNet()
    twin = copy.deepcopy(model).double()
    inputs, targets = batch(twin, 4)
    targets[0, 1:] = -100
    harness = Harness(twin, loss_reduction="sum")
    with harness.capture.armed(harness.bases, harness.sink):
        logits = twin(inputs)
        harness.capture.count_terms(10)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    before, after = stepped(model, "empirical", told)
    for name in before:
        A, G = (harness.factor(name, side).double() for side in "AG")
        assert relative_error(after[name], solved(before[name], A, G, 0.1)) < 1e-4, name


def test_an_exact_step_is_the_inverse_of_the_gauss_newton_factors() -> None:
    torch.manual_seed(0)
    model = TokenNet()
    twin = copy.deepcopy(model).double()
    inputs, targets = batch(twin, 12)
    G = exact_output_factors(twin, inputs)
    A = {name: factor for (name, side), factor in factors(model).items() if side == "A"}
    with kfac(model, fisher_type="exact") as precond:
        logits = model(inputs.float())
        precond.sample(logits, CASES["tokens"].likelihood, targets=targets)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        before = {name: matrix_of(module) for name, module in covered(model).items()}
        precond.step()
    for name, module in covered(model).items():
        expected = solved(before[name], A[name], G[name], 0.1)
        assert relative_error(matrix_of(module), expected) < 1e-4, name
