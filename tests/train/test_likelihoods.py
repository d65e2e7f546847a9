"""Each likelihood against the loss of torch that it describes, in float64 to 1e-12."""

from __future__ import annotations

import pytest
import torch
from loss_cases import CASES, LossCase, N, labels, numbers, seeded, true_count, true_hessian
from torch import Tensor

from distcurv.errors import ConfigError, ShapeError
from distcurv.train.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    CountsTerms,
    Gaussian,
    HasHessian,
    as_likelihood,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def weight_of(case: LossCase, logits: Tensor) -> Tensor:
    weights = case.likelihood.weights(logits, case.targets)
    return torch.ones_like(logits) if weights is None else weights.expand(logits.shape)


def test_every_likelihood_has_cases_and_all_methods() -> None:
    assert {case.kind for case in CASES.values()} == set(LIKELIHOODS)
    for case in CASES.values():
        assert type(case.likelihood) is LIKELIHOODS[case.kind]
        assert isinstance(case.likelihood, CountsTerms)
        assert isinstance(case.likelihood, HasHessian)
        assert as_likelihood(case.likelihood) is case.likelihood


@each_case
def test_the_count_is_what_the_mean_divides_by(case: LossCase) -> None:
    count = torch.as_tensor(case.likelihood.count(case.shaped(case.logits()), case.targets))
    assert count.dim() == 0
    torch.testing.assert_close(count.double(), true_count(case), rtol=1e-12, atol=0.0)


@each_case
def test_the_weighted_factors_make_the_hessian_and_mix_no_terms(case: LossCase) -> None:
    logits = case.logits()
    shaped = case.shaped(logits)
    weights = weight_of(case, shaped)
    made = torch.zeros(logits.numel(), logits.numel(), dtype=torch.float64)
    for factor in case.likelihood.hessian_factors(shaped):
        assert factor.shape == shaped.shape
        vector = (factor * weights.sqrt()).movedim(1 if case.classes_second else -1, -1)
        terms = vector.flatten(0, -2) if case.kind == "categorical" else vector.flatten()[:, None]
        touched = terms.ne(0).any(1).view(N, -1).sum(1)
        assert (touched <= 1).all()
        for sample in range(N):
            alone = torch.zeros_like(vector)
            alone[sample] = vector[sample]
            made += torch.outer(alone.flatten(), alone.flatten())
    torch.testing.assert_close(made, true_hessian(case, logits), rtol=1e-12, atol=1e-12)


@each_case
def test_draws_have_the_hessian_for_the_expected_square_of_their_score(case: LossCase) -> None:
    """Within 5 standard errors, fixed seed; no class is so rare that 300 draws miss it."""
    logits = 0.2 * case.shaped(case.logits())
    generator = seeded(0)
    squares = []
    for _ in range(300):
        leaf = logits.clone().requires_grad_(True)
        drawn = case.likelihood.sample(logits, generator)
        (score,) = torch.autograd.grad(case.likelihood.nll(leaf, drawn), leaf)
        squares.append(score.square())
    expected = sum(
        (factor.square() for factor in case.likelihood.hessian_factors(logits)),
        torch.zeros_like(logits),
    )
    stacked = torch.stack(squares)
    error = (stacked.mean(0) - expected).abs()
    assert (error <= 5 * stacked.std(0) / len(squares) ** 0.5 + 1e-12).all()


def test_smoothing_does_not_change_the_curvature() -> None:
    logits, targets = torch.randn(3, 5), labels(3)
    for smoothing in (0.0, 0.5):
        weights = Categorical(label_smoothing=smoothing).weights(logits, targets)
        assert weights is not None
        assert torch.equal(weights, torch.ones(3, 1))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_an_empty_batch_has_no_term(likelihood: Categorical | Bernoulli | Gaussian) -> None:
    logits = torch.zeros(0, 3)
    assert likelihood.count(logits, None) == 0
    for factor in likelihood.hessian_factors(logits):
        assert factor.shape == (0, 3)


def test_bad_settings_are_refused() -> None:
    for make, match in (
        (lambda: Categorical(class_dim=2), "class_dim"),
        (lambda: Categorical(weight=torch.ones(2, 2)), "weight"),
        (lambda: Categorical(label_smoothing=1.5), "label_smoothing"),
        (lambda: Gaussian(0.0), "var"),
        (lambda: Gaussian(torch.tensor([1.0, -1.0])), "var"),
    ):
        with pytest.raises(ConfigError, match=match):
            make()


def test_targets_and_weights_that_do_not_fit_are_refused() -> None:
    logits = torch.randn(N, 3, 5)
    for likelihood, targets, match in (
        (Categorical(), labels(N), r"class indices \(4, 3\)"),
        (Categorical(1), labels(N, 3), r"class indices \(4, 5\)"),
        (Categorical(), numbers(N, 3), "probabilities in the shape"),
        (Categorical(weight=torch.ones(4)), labels(N, 3), "4 class weights"),
        (Bernoulli(pos_weight=torch.ones(5)), None, "needs targets"),
        (Bernoulli(mask=torch.ones(N, 2, 1)), None, "mask"),
        (Bernoulli(weight=torch.ones(2, N, 3, 5)), None, "weight"),
        (Gaussian(weight=torch.ones(3)), None, "weight"),
    ):
        with pytest.raises(ShapeError, match=match):
            likelihood.weights(logits, targets)
    with pytest.raises(ConfigError, match="needs the targets"):
        Categorical(weight=torch.ones(5)).count(logits, None)
    with pytest.raises(ShapeError, match="give \\[N, C\\]"):
        Categorical().sample(torch.randn(3), seeded(0))
