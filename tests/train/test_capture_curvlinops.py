"""Factors against curvlinops (`KFACLinearOperator`) as an independent witness, in float64.

Both take the Fisher of the mean over the loss's terms.  For ``reduction="sum"`` curvlinops does not
divide by their number, distcurv does.
"""

from __future__ import annotations

import pytest
import torch
from capture_harness import ConvNet, Harness, TokenNet, batch, cross_entropy
from curvlinops import KFACLinearOperator
from test_capture_mc import EveryClass
from torch import Tensor, nn


class LogitsSecond(nn.Module):
    """curvlinops wants cross-entropy over [N, C, T]; the model gives [N, T, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits if logits.dim() == 2 else logits.transpose(1, 2)


def witness(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    reduction: str,
    weight_sharing: str,
    fisher_type: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By module name: the input factors and the output factors, both as means over terms."""
    operator = KFACLinearOperator(
        LogitsSecond(model),
        nn.CrossEntropyLoss(reduction=reduction),
        list(model.parameters()),
        [(inputs, targets)],
        check_deterministic=False,
        fisher_type=fisher_type,
        kfac_approx=weight_sharing,
        separate_weight_and_bias=False,
    )
    operator.compute_kronecker_factors()
    divisor = targets.numel() if reduction == "sum" else 1
    a, g = operator._input_covariances, operator._gradient_covariances
    strip = len("model.")
    return (
        {name[strip:]: factor for name, factor in a.items()},
        {name[strip:]: factor / divisor for name, factor in g.items()},
    )


def compare(harness: Harness, expected: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    assert set(expected[0]) == set(expected[1]) == set(harness.modules)
    for side, factors in zip("AG", expected, strict=True):
        for name, factor in factors.items():
            harness.assert_factor(name, side, factor, 1e-6)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_empirical_factors(bias: bool, reduction: str, weight_sharing: str) -> None:
    torch.manual_seed(5)
    model = ConvNet(bias).double()
    inputs, targets = batch(model, 6)
    harness = Harness(model, loss_reduction=reduction, weight_sharing=weight_sharing)
    with harness.capture.armed(harness.bases, harness.sink):
        cross_entropy(reduction)(model(inputs), targets).backward()
    expected = witness(
        model,
        inputs,
        targets,
        reduction=reduction,
        weight_sharing=weight_sharing,
        fisher_type="empirical",
    )
    compare(harness, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_factors_of_tokens_whose_number_is_told(reduction: str) -> None:
    torch.manual_seed(5)
    model = TokenNet().double()
    inputs, targets = batch(model, 6)
    harness = Harness(model, loss_reduction=reduction)
    with harness.capture.armed(harness.bases, harness.sink):
        logits = model(inputs)
        harness.capture.count_terms(targets.numel())
        cross_entropy(reduction)(logits, targets).backward()
    expected = witness(
        model,
        inputs,
        targets,
        reduction=reduction,
        weight_sharing="expand",
        fisher_type="empirical",
    )
    compare(harness, expected)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [ConvNet, TokenNet])
def test_expected_monte_carlo_and_exact_factors(
    kind: type[nn.Module], reduction: str, fisher_type: str, weight_sharing: str
) -> None:
    """The expectation over drawn classes is the ``type-2`` Fisher of curvlinops."""
    if (kind, fisher_type, weight_sharing) == (TokenNet, "exact", "reduce"):
        pytest.skip("curvlinops sums over tokens before it squares, also those of one class")
    torch.manual_seed(5)
    model = kind(True).double()
    inputs, targets = batch(model, 6)
    harness = Harness(
        model, loss_reduction=reduction, fisher_type=fisher_type, weight_sharing=weight_sharing
    )
    with harness.capture.armed(harness.bases, harness.sink):
        logits = model(inputs)
        if fisher_type == "exact":
            harness.capture.sample(logits, "categorical")
        else:
            for label in range(4):
                harness.capture.sample(logits, EveryClass(label))
        cross_entropy(reduction)(logits, targets).backward()
    expected = witness(
        model,
        inputs,
        targets,
        reduction=reduction,
        weight_sharing=weight_sharing,
        fisher_type="type-2",
    )
    compare(harness, expected)
