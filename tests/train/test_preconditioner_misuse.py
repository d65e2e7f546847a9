"""Preconditioner: wrong use is told before anything has moved, and spoilt samples are counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcurv import KfacConfig, Preconditioner
from distcurv.errors import ConfigError


def backward(model: nn.Module, scale: float = 1.0) -> None:
    model.zero_grad()
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    (scale * model(inputs).square().mean()).backward()


def test_a_step_without_the_learning_rate_of_kl_clip_changes_nothing() -> None:
    model = nn.Linear(6, 4)
    with Preconditioner(model, KfacConfig(rank=2, kl_clip=1e-3), workers="inline") as precond:
        backward(model)
        before = model.weight.grad.clone()
        with pytest.raises(ConfigError, match="kl_clip needs a learning rate"):
            precond.step()
        assert precond.metrics()["step"] == 0
        assert torch.equal(model.weight.grad, before)
        precond.step(lr=0.1)  # the statistics of this very backward are still there
        assert precond.metrics()["statistics_folded"] == 1
        assert not torch.equal(model.weight.grad, before)


def test_before_the_first_install_too() -> None:
    model = nn.Linear(6, 4)
    config = KfacConfig(rank=2, kl_clip=1e-3, early_steps=0)
    with Preconditioner(model, config, workers="inline") as precond:
        backward(model)
        with pytest.raises(ConfigError, match="kl_clip needs a learning rate"):
            precond.step()


def test_the_damping_of_a_dense_kind_cannot_be_changed_in_vain() -> None:
    config = KfacConfig(kind="dense", damping=0.5)
    with Preconditioner(nn.Linear(6, 4), config, workers="inline") as precond:
        with pytest.raises(ConfigError, match="damping of kind 'dense' is fixed"):
            precond.damping = 0.1
        assert precond.damping == 0.5


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damping_that_cannot_work_is_refused(damping: float) -> None:
    with Preconditioner(nn.Linear(6, 4), KfacConfig(rank=2), workers="inline") as precond:
        with pytest.raises(ConfigError, match=r"damping is .*: give a number > 0"):
            precond.damping = damping
        assert precond.damping == KfacConfig().damping


def test_samples_that_are_not_finite_are_counted() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    config = KfacConfig(rank=2, curvature_upd_interval=1)
    with Preconditioner(model, config, workers="inline") as precond:
        for scale in (1.0, float("nan"), 1.0):
            backward(model, scale)
            precond.step()
        assert precond.metrics()["statistics_nonfinite"] == 2  # two layers, one step
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ([nn.Linear(2, 2)], "model is a list: give the torch.nn.Module itself"),
        (nn.Linear(2, 2).requires_grad_(False), "none of its parameters is trained"),
        (nn.Linear(2, 2, device="meta"), "on the device meta: give them memory first"),
        (nn.LazyLinear(2), "it is lazy: run the model once before"),
    ],
    ids=["list", "frozen", "meta", "lazy"],
)
def test_what_is_no_model_to_train_is_refused_with_the_reason(model: nn.Module, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Preconditioner(model, KfacConfig(), workers="inline")
