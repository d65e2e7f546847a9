"""The Fisher type mc: targets drawn from the model, against the exact expectation.

The exact Fisher of a categorical output enumerates the classes.  Monte Carlo averages must lie
within 5 standard errors of it (fixed seed)."""

from __future__ import annotations

import pytest
import torch
from capture_harness import ConvNet, Harness, TokenNet, assert_same_totals, batch, cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distcurv.errors import CaptureError, ConfigError
from distcurv.train.likelihoods import Bernoulli, Categorical, Gaussian


class EveryClass:
    """No drawing: class c with the weight p_c, so that C calls of `sample` give the exact Fisher
    (the statistic is quadratic in the gradient, hence the root)."""

    def __init__(self, label: int) -> None:
        self.label = label

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full(logits.shape[:-1], self.label)

    def nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = logits.detach().softmax(-1)[..., self.label].sqrt()
        terms = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        return (weights.flatten() * terms).sum()


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind(True).double()


def exact_output_factors(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """1/(N T) sum over samples n, drawn positions t and classes c of p_c times the outer products
    of the gradients of -log p_c with respect to each layer's output."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def keep(m: nn.Module, a: object, out: Tensor, name: str = name) -> Tensor:
                outputs[name] = out
                return out.clone()

            handles.append(module.register_forward_hook(keep))
    factors: dict[str, Tensor] = {}
    logits = model(inputs)
    for handle in handles:
        handle.remove()
    flat = logits.flatten(0, -2)
    log_p = flat.log_softmax(-1)
    for row, label in ((r, c) for r in range(len(flat)) for c in range(flat.shape[1])):
        grads = torch.autograd.grad(-log_p[row, label], list(outputs.values()), retain_graph=True)
        for (name, out), grad in zip(outputs.items(), grads, strict=True):
            g = grad.movedim(1, -1) if out.dim() == 4 else grad
            g = g.reshape(-1, g.shape[-1])
            part = log_p[row, label].exp().detach() * g.T @ g
            factors[name] = factors[name] + part if name in factors else part
    return {name: factor / len(flat) for name, factor in factors.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("encoding", ["dense", "sketch"])
@pytest.mark.parametrize("kind", [ConvNet, TokenNet])
def test_enumerating_the_classes_gives_the_exact_fisher(
    kind: type[nn.Module], encoding: str, reduction: str
) -> None:
    model = make(kind)
    inputs, targets = batch(model, 5)
    harness = Harness(model, encoding=encoding, fisher_type="mc", loss_reduction=reduction)
    with harness.capture.armed(harness.bases, harness.sink):
        for _ in range(2):
            logits = model(inputs)
            for label in range(4):
                harness.capture.sample(logits, EveryClass(label))
            cross_entropy(reduction)(logits, targets).backward()
    for name, factor in exact_output_factors(model, inputs).items():
        harness.assert_factor(name, "G", factor, 1e-6)
        assert harness.count(name, "G") == 2 * targets.numel()


@pytest.mark.parametrize("n_samples", [1, 5])
def test_monte_carlo_is_unbiased_whatever_the_number_of_samples(n_samples: int) -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 2)
    exact = exact_output_factors(model, inputs)["first"]
    harness = Harness(model, fisher_type="mc", seed=11)
    draws = []
    for _ in range(60):
        harness.totals.clear()
        with harness.capture.armed(harness.bases, harness.sink):
            logits = model(inputs)
            harness.capture.sample(logits, "categorical", n_samples)
            cross_entropy("mean")(logits, targets).backward()
        draws.append(harness.factor("first", "G"))
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - exact).abs()
    standard_error = stacked.std(0) / len(draws) ** 0.5
    assert (error <= 5 * standard_error).all()
    # Not so wide that anything passes: F / n_samples would be far outside.
    assert (5 * standard_error.diagonal() < 0.5 * exact.diagonal()).all()


def test_the_training_loss_contributes_nothing_and_no_gradient_is_touched() -> None:
    model = make(ConvNet)
    inputs, targets = batch(model, 5)
    totals = []
    for factor in (1.0, 1000.0):
        harness = Harness(model, fisher_type="mc", seed=4)
        model.zero_grad()
        with harness.capture.armed(harness.bases, harness.sink):
            logits = model(inputs)
            harness.capture.sample(logits, "categorical")
            assert all(p.grad is None for p in model.parameters())
            assert not harness.totals
            (factor * cross_entropy("mean")(logits, targets)).backward()
        totals.append(harness.totals)
        assert set(harness.deliveries.values()) == {1}
    assert_same_totals(*totals, 0.0)


def test_gradients_are_bit_identical_with_sampling_and_the_global_generator_untouched() -> None:
    model = ConvNet()
    inputs, targets = batch(model, 5)
    cross_entropy("mean")(model(inputs), targets).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    harness = Harness(model, fisher_type="mc")
    model.zero_grad()
    state = torch.get_rng_state()
    with harness.capture.armed(harness.bases, harness.sink):
        logits = model(inputs)
        harness.capture.sample(logits, "categorical", 3)
        cross_entropy("mean")(logits, targets).backward()
    assert torch.equal(state, torch.get_rng_state())
    sampled = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(sampled) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, sampled, strict=True))


def test_the_seed_and_a_given_generator_make_draws_repeatable() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 5)

    def run(seed: int, generator_seed: int | None = None) -> Harness:
        harness = Harness(model, fisher_type="mc", seed=seed)
        generator = None
        if generator_seed is not None:
            generator = torch.Generator().manual_seed(generator_seed)
        with harness.capture.armed(harness.bases, harness.sink):
            logits = model(inputs)
            harness.capture.sample(logits, Categorical(), generator=generator)
            cross_entropy("mean")(logits, targets).backward()
        return harness

    assert_same_totals(run(1).totals, run(1).totals, 0.0)
    assert_same_totals(run(1, 9).totals, run(2, 9).totals, 0.0)
    with pytest.raises(AssertionError):
        assert_same_totals(run(1).totals, run(2).totals, 0.0)


@pytest.mark.parametrize("order", ["interleaved", "together"])
def test_several_forwards_before_or_between_backwards(order: str) -> None:
    """Micro-batches one after another, and two forwards whose logits are sampled one by one."""
    model = make(ConvNet)
    inputs, targets = batch(model, 6)
    loss = cross_entropy("sum")
    harness = Harness(model, fisher_type="mc", loss_reduction="sum")
    with harness.capture.armed(harness.bases, harness.sink):
        losses = []
        for x, y in zip(inputs.split([2, 4]), targets.split([2, 4]), strict=True):
            logits = model(x)
            for label in range(4):
                harness.capture.sample(logits, EveryClass(label))
            losses.append(loss(logits, y))
            if order == "interleaved":
                losses.pop().backward()
        if losses:
            torch.stack(losses).sum().backward()
    for name, factor in exact_output_factors(model, inputs).items():
        harness.assert_factor(name, "G", factor, 1e-6)
        assert harness.count(name, "G") == 6


def test_a_branch_that_the_logits_do_not_see_has_a_zero_fisher() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.main, self.side = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x)
            return self.main(hidden), self.side(hidden)

    model = TwoHeads()
    harness = Harness(model, fisher_type="mc")
    with harness.capture.armed(harness.bases, harness.sink):
        main, side = model(torch.randn(4, 3))
        harness.capture.sample(main, "categorical")
        (main.sum() + side.square().sum()).backward()
    assert not harness.totals["side"]["G.packed"].any()
    assert harness.count("side", "G") == 4
    assert harness.totals["body"]["G.packed"].any()


def test_a_non_reentrant_checkpoint_samples_once_and_keeps_no_recomputed_graph() -> None:
    model = make(ConvNet)
    inputs, targets = batch(model, 5)
    plain, checkpointed = (Harness(model, fisher_type="mc", seed=2) for _ in range(2))
    with plain.capture.armed(plain.bases, plain.sink):
        logits = model(inputs)
        plain.capture.sample(logits, "categorical")
        cross_entropy("mean")(logits, targets).backward()
    checkpointed.arm()
    logits = checkpoint(model, inputs, use_reentrant=False)
    checkpointed.capture.sample(logits, "categorical")
    cross_entropy("mean")(logits, targets).backward()
    arming = checkpointed.capture._arming
    assert arming is not None and not arming.edges
    assert checkpointed.capture.finish() == frozenset()
    assert_same_totals(plain.totals, checkpointed.totals, 1e-6)


def test_a_backward_without_sample_is_an_error_that_says_what_to_do() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 5)
    harness = Harness(model, fisher_type="mc")
    harness.arm()
    cross_entropy("mean")(model(inputs), targets).backward()
    with pytest.raises(CaptureError, match=r"first, head.*sample\(logits"):
        harness.capture.finish()
    assert not harness.capture.is_armed
    assert not harness.totals

    # One micro-batch of two without sample().
    harness.arm()
    for sampled in (True, False):
        logits = model(inputs)
        if sampled:
            harness.capture.sample(logits, "categorical")
        cross_entropy("mean")(logits, targets).backward()
    with pytest.raises(CaptureError, match="every micro-batch"):
        harness.capture.finish()


def test_a_reentrant_checkpoint_is_an_error_that_says_what_to_do() -> None:
    model = make(TokenNet)
    inputs, targets = batch(model, 5)
    inputs.requires_grad_(True)
    harness = Harness(model, fisher_type="mc")
    harness.arm()
    logits = checkpoint(model, inputs, use_reentrant=True)
    harness.capture.sample(logits, "categorical")
    cross_entropy("mean")(logits, targets).backward()
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        harness.capture.finish()


def test_sample_does_nothing_where_nothing_is_due_and_refuses_misuse() -> None:
    model = make(TokenNet)
    inputs, _ = batch(model, 5)
    harness = Harness(model, fisher_type="mc")
    logits = model(inputs)
    harness.capture.sample(logits, "categorical")
    harness.arm()
    logits = model(inputs)
    with pytest.raises(CaptureError, match="without a graph"):
        harness.capture.sample(logits.detach(), "categorical")
    with pytest.raises(ConfigError, match="n_samples"):
        harness.capture.sample(logits, "categorical", 0)
    with pytest.raises(ConfigError, match="'poisson'"):
        harness.capture.sample(logits, "poisson")
    with pytest.raises(ConfigError, match="nll"):
        harness.capture.sample(logits, Categorical)  # type: ignore[arg-type]
    harness.capture.disarm()
    empirical = Harness(model)
    with pytest.raises(CaptureError, match="'empirical'"):
        empirical.capture.sample(logits, "categorical")


def test_autocast_logits_are_sampled_in_float32() -> None:
    model = TokenNet()
    inputs, targets = batch(model, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        harness = Harness(model, fisher_type="mc")
        with harness.capture.armed(harness.bases, harness.sink):
            logits = model(inputs)
            assert logits.dtype == torch.bfloat16
            for label in range(4):
                harness.capture.sample(logits, EveryClass(label))
            cross_entropy("mean")(logits, targets).backward()
    exact = exact_output_factors(model, inputs)
    harness.assert_factor("first", "G", exact["first"], 0.02)


@pytest.mark.parametrize(
    "likelihood,expected",
    [
        # Second derivatives of the negative log-likelihood in the logits.
        (Bernoulli(), lambda logits: torch.diag((logits.sigmoid() * (-logits).sigmoid()).mean(0))),
        (Gaussian(0.5), lambda logits: torch.eye(logits.shape[1], dtype=logits.dtype) * 2),
        (
            Categorical(),
            lambda logits: (
                torch.diag(logits.softmax(-1).mean(0))
                - logits.softmax(-1).T @ logits.softmax(-1) / len(logits)
            ),
        ),
    ],
)
def test_likelihoods_draw_from_their_own_density(likelihood: object, expected: object) -> None:
    """E[g g^T] over drawn targets equals the Hessian in the logits (information equality), within
    5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_(True)
    products = []
    for _ in range(250):
        targets = likelihood.sample(logits.detach(), generator)  # type: ignore[attr-defined]
        (g,) = torch.autograd.grad(likelihood.nll(logits, targets), logits)  # type: ignore[attr-defined]
        products.append(g.T @ g / len(g))
    stacked = torch.stack(products)
    error = (stacked.mean(0) - expected(logits.detach())).abs()  # type: ignore[operator]
    assert (error <= 5 * stacked.std(0) / len(products) ** 0.5 + 1e-12).all()
    assert targets.numel() == (6 if isinstance(likelihood, Categorical) else 18)


def test_a_gaussian_needs_a_variance() -> None:
    with pytest.raises(ConfigError, match="var"):
        Gaussian(0.0)
