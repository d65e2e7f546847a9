"""What makers read from a loss call: terms, masks, weights, reductions; against torch's mean."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch
from kfac_oracle import doubled, factors, layers, matrix_of, relative, solved
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.errors import ShapeError
from distcurv.makers import PreconditioningConfig
from distcurv.makers.kfac import KfacGradientMaker
from distcurv.makers.loss_reading import for_sampling, read_call
from distcurv.train.likelihoods import Categorical, Gaussian

N, T, C, DAMPING = 5, 4, 3, 0.1
WEIGHT = torch.tensor([0.5, 1.0, 3.0])


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """A model [N, T, 2] -> [N, T, C], inputs, and targets of which some are masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, C))
    targets = torch.randint(0, C, (N, T))
    targets[0, 1:] = -100
    targets[3, 2] = -100
    return model, torch.randn(N, T, 2), targets


LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mean": (F.cross_entropy, {}),
    "sum": (F.cross_entropy, {"reduction": "sum"}),
    "other-index": (F.cross_entropy, {"ignore_index": 1}),
    "module": (nn.CrossEntropyLoss(), {}),
    "summing-module": (nn.CrossEntropyLoss(reduction="sum", weight=WEIGHT), {}),
    "smoothed": (F.cross_entropy, {"label_smoothing": 0.2}),
    "weighted": (F.cross_entropy, {"weight": WEIGHT}),
    "partial": (partial(F.cross_entropy, reduction="sum"), {}),
}


@pytest.mark.parametrize("layout", ["flat", "classes-second"])
@pytest.mark.parametrize("name", LOSSES)
def test_empirical_factors_are_those_of_the_counted_terms(name: str, layout: str) -> None:
    loss_fn, kwargs = LOSSES[name]
    model, x, t = tokens()
    if name == "other-index":
        t = t.where(t != -100, 1)
    call = read_call(loss_fn, (torch.zeros(1, C), torch.zeros(1, dtype=torch.long)), kwargs)
    assert call is not None
    settings = {k: v for k, v in call.arguments.items() if k not in ("input", "target")}
    settings["weight"] = None if settings["weight"] is None else WEIGHT.double()
    kept = t != settings["ignore_index"]
    terms = float(kept.sum())
    if settings["weight"] is not None:
        terms = float(WEIGHT[t[kept]].sum())
    summed = {**settings, "reduction": "sum"}
    expected = factors(
        doubled(model),
        x.double(),
        lambda z: F.cross_entropy(z.flatten(0, 1), t.flatten(), **summed),
        terms,
    )
    with closing(
        KfacGradientMaker(model, PreconditioningConfig(damping=DAMPING), "fisher_emp")
    ) as gm:
        y = gm.setup_model_call(model, x)
        if layout == "flat":
            gm.setup_loss_call(loss_fn, y.flatten(0, 1), t.flatten(), **kwargs)
        else:
            gm.setup_loss_call(loss_fn, y.transpose(1, 2), t, **kwargs)
        gm.forward_and_backward()
    found = {key: p.grad for key, p in model.named_parameters()}
    raw = doubled(model)
    plain = {**settings}
    F.cross_entropy(raw(x.double()).flatten(0, 1), t.flatten(), **plain).backward()
    grads = {key: p.grad for key, p in raw.named_parameters()}
    for key, module in layers(model).items():
        direction = solved(*expected[key], matrix_of(module, grads, key), DAMPING)  # type: ignore[arg-type]
        assert relative(matrix_of(module, found, key), direction) < 1e-4, key  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["flat", "classes-second"])
def test_draws_and_exact_matrices_leave_masked_terms_out(layout: str) -> None:
    """The exact matrix of a batch with masks is that of the counted tokens' Hessians."""
    model, x, t = tokens()
    with closing(
        KfacGradientMaker(model, PreconditioningConfig(damping=DAMPING), "fisher_exact")
    ) as gm:
        y = gm.setup_model_call(model, x)
        if layout == "flat":
            gm.setup_loss_call(F.cross_entropy, y.flatten(0, 1), t.flatten())
        else:
            gm.setup_loss_call(F.cross_entropy, y.transpose(1, 2), t)
        gm.forward_and_backward()
    kept = (t != -100).double()
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for label in range(C):

        def weighted(z: Tensor, label: int = label) -> Tensor:
            root = z.softmax(-1)[..., label].sqrt().detach() * kept
            return -(root * z.log_softmax(-1)[..., label]).sum()

        for key, (A, G) in factors(doubled(model), x.double(), weighted, float(kept.sum())).items():
            total[key] = (A, G + total[key][1]) if key in total else (A, G)
    raw = doubled(model)
    F.cross_entropy(raw(x.double()).flatten(0, 1), t.flatten()).backward()
    grads = {key: p.grad for key, p in raw.named_parameters()}
    for key, module in layers(model).items():
        direction = solved(*total[key], matrix_of(module, grads, key), DAMPING)  # type: ignore[arg-type]
        found = {k: p.grad for k, p in model.named_parameters()}
        assert relative(matrix_of(module, found, key), direction) < 1e-4, key  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact"])
def test_squared_errors_count_single_outputs(fisher_type: str, reduction: str) -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    x, t = torch.randn(6, 3), torch.randn(6, 2)
    own = KfacGradientMaker(
        model, PreconditioningConfig(damping=DAMPING), fisher_type, "mse", var=0.5
    )
    with closing(own) as gm:
        gm.setup_loss_call(F.mse_loss, gm.setup_model_call(model, x), t, reduction=reduction)
        gm.forward_and_backward()
    error = (model(x) - t).detach().double()
    a = torch.cat([x, torch.ones(6, 1)], 1).double()
    A = a.T @ a / 6
    # Of the log-likelihood with variance 1/2, which is the squared error, the Hessian is 2.
    G = (
        4 * error.T @ error / 12
        if fisher_type == "fisher_emp"
        else 2 * 6 * torch.eye(2).double() / 12
    )
    raw = 2 * error.T @ a / (12 if reduction == "mean" else 1)
    assert model.weight.grad is not None and model.bias.grad is not None
    found = torch.cat([model.weight.grad, model.bias.grad.unsqueeze(1)], 1).double()
    assert relative(found, solved(A, G, raw, DAMPING)) < 1e-4


def test_logits_and_targets_by_layout() -> None:
    images = torch.randn(2, 3, 4, 4)
    call = read_call(F.cross_entropy, (images, torch.zeros(2, 4, 4, dtype=torch.long)), {})
    likelihood, targets = for_sampling(call, "cross_entropy", images, 1.0)
    assert isinstance(likelihood, Categorical) and likelihood.class_dim == 1
    assert targets is not None and targets.shape == (2, 4, 4)
    square = torch.randn(2, 3, 3)  # tokens and classes of one size
    call = read_call(F.cross_entropy, (square.mT, torch.zeros(2, 3, dtype=torch.long)), {})
    likelihood, targets = for_sampling(call, "cross_entropy", square, 1.0)
    assert isinstance(likelihood, Categorical) and likelihood.class_dim == -1
    soft = torch.rand(2, 5, 3).softmax(-1)
    call = read_call(F.cross_entropy, (torch.randn(2, 3, 5), soft.mT), {})
    _, targets = for_sampling(call, "cross_entropy", torch.randn(2, 5, 3), 1.0)
    assert targets is not None and torch.equal(targets, soft)
    shifted = read_call(F.cross_entropy, (torch.randn(8, 3), torch.zeros(8, dtype=torch.long)), {})
    with pytest.raises(ShapeError, match=r"setup_logits_repr.*dummy_y.logits\[:, :-1\]"):
        for_sampling(shifted, "cross_entropy", torch.randn(2, 5, 3), 1.0)
    assert isinstance(for_sampling(None, "mse", square, 2.0).likelihood, Gaussian)


def test_other_losses_are_not_guessed() -> None:
    class Own(nn.CrossEntropyLoss):
        pass

    assert read_call(F.nll_loss, (), {}) is None
    assert read_call(Own(), (), {}) is None
    assert read_call(None, (), {}) is None
