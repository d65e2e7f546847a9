"""SengGradientMaker with sketch and truncation, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from batch_makers import DAMPING, N, classes, make, samples_of, seng_maker, setup, step_of
from dense_derivatives import row
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distcurv.errors import CaptureError, ConfigError
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.seng import SengGradientMaker

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sketch(indices: Tensor | None, d: int, bias: bool = False) -> Tensor:
    """The matrix [k, d] that draws coordinates; a bias coordinate stays."""
    chosen = range(d) if indices is None else indices.tolist()
    S = torch.zeros(len(chosen) + bias, d + bias)
    for i, j in enumerate(chosen):
        S[i, j] = (d / len(chosen)) ** 0.5
    if bias:
        S[-1, d] = 1
    return S


def test_the_sketched_definition() -> None:
    model, x, t = make("mlp")
    gm = SengGradientMaker(model, PreconditioningConfig(damping=DAMPING), sketching_size=2)
    wanted = []
    step_of(gm, model, x, t)
    for name, module in (("0", model[0]), ("2", model[2])):
        Do, Di = module.weight.shape
        flat_rows = samples_of(model, x, t, [module.weight, module.bias])
        weight, bias = flat_rows.split([Do * Di, Do], 1)
        R = torch.cat([weight.view(N, Do, Di), bias.view(N, Do, 1)], 2) / N**0.5
        g = R.sum(0) / N**0.5
        S_in = sketch(gm.state[f"{name}.inputs"], Di, bias=True)
        S_out = sketch(gm.state[f"{name}.outputs"], Do)
        assert len(S_in) == 3
        assert len(S_out) == 2
        small = (S_out @ R @ S_in.T).flatten(1)
        c = torch.linalg.solve(
            small @ small.T + DAMPING * torch.eye(N), small @ (S_out @ g @ S_in.T).flatten()
        )
        found = (g - torch.einsum("n,noi->oi", c, R)) / DAMPING
        wanted += [found[:, :Di], found[:, Di]]
    got = [p.grad for p in model.parameters()]
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_draws_follow_from_seed_and_step() -> None:
    def run(seed: int) -> list[Tensor]:
        model, x, t = make("mlp")
        gm = SengGradientMaker(model, PreconditioningConfig(damping=1, seed=seed), 2)
        return [step_of(gm, model, x, t) for _ in range(3)]

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_truncation_over_positions() -> None:
    model, x, t = make("conv")
    exact = step_of(seng_maker(model), model, x, t)
    config = PreconditioningConfig(damping=DAMPING)
    full = SengGradientMaker(model, config, truncated_rank=3)  # the layers have 3 outputs at most
    torch.testing.assert_close(step_of(full, model, x, t), exact, **TOLERANCE)
    low = SengGradientMaker(model, config, truncated_rank=1)
    assert not torch.allclose(step_of(low, model, x, t), exact)
    assert low.state["0.g"].shape == (N, 1, 3)


def test_the_data_size_divides() -> None:
    model, x, t = make("mlp")
    R = samples_of(model, x, t, [*model[0].parameters()])
    wanted = torch.linalg.solve(R.T @ R / 24 + DAMPING * torch.eye(R.shape[1]), R.mean(0))
    got = step_of(seng_maker(model, data_size=4 * N), model, x, t)
    torch.testing.assert_close(got[: len(wanted)], wanted, **TOLERANCE)


def test_other_layers_keep_the_gradient_of_the_loss() -> None:
    """Not N times that."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
    )
    x, t = torch.randn(N, 2, 3, 3), classes()
    alone = [*model[0].parameters(), *model[1].parameters()]
    wanted = row(F.cross_entropy(model(x), t), alone)
    gm = seng_maker(model)
    got = step_of(gm, model, x, t)
    torch.testing.assert_close(got[: len(wanted)], wanted, **TOLERANCE)
    assert gm.summary().endswith("1 layers: 3")


def test_layers_that_share_a_parameter_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    x, t = torch.randn(N, 4), classes()
    shared = [model[0].weight, model[0].bias, model[2].bias]
    wanted = row(F.cross_entropy(model(x), t), shared)
    gm = seng_maker(model)
    torch.testing.assert_close(step_of(gm, model, x, t)[: len(wanted)], wanted, **TOLERANCE)
    assert gm.summary().endswith("1 layers: 4")


def test_the_transposed_linear_layer_of_transformers() -> None:
    torch.manual_seed(0)
    plain, turned = nn.Linear(4, 3), Conv1D(3, 4)
    with torch.no_grad():
        turned.weight.copy_(plain.weight.T)
        turned.bias.copy_(plain.bias)
    x, t = torch.randn(N, 4), classes()
    wanted = step_of(seng_maker(plain), plain, x, t)
    got = step_of(seng_maker(turned), turned, x, t)
    torch.testing.assert_close(got[:12].view(4, 3).T.flatten(), wanted[:12], **TOLERANCE)
    torch.testing.assert_close(got[12:], wanted[12:], **TOLERANCE)


def test_a_layer_without_a_part_in_the_loss_is_left_alone() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.measured = (nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.measured(x)
            out: Tensor = self.used(x)
            return out

    torch.manual_seed(0)
    model, x, t = Partly(), torch.randn(N, 4), classes()
    gm = seng_maker(model)
    setup(gm, model, x, t)
    gm.forward_and_backward()
    assert model.unused.weight.grad is None
    assert model.measured.weight.grad is None
    R = samples_of(model, x, t, [*model.used.parameters()])
    wanted = torch.linalg.solve(R.T @ R / N + DAMPING * torch.eye(R.shape[1]), R.mean(0))
    assert model.used.weight.grad is not None
    torch.testing.assert_close(model.used.weight.grad.flatten(), wanted[:12], **TOLERANCE)


def test_a_compiled_model() -> None:
    model, x, t = make("mlp")
    wanted = step_of(seng_maker(model), model, x, t)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    torch.testing.assert_close(step_of(seng_maker(compiled), model, x, t), wanted, **TOLERANCE)


def test_hooks_are_gone_after_a_step_and_after_an_error() -> None:
    model, x, t = make("mlp")
    gm = seng_maker(model)
    step_of(gm, model, x, t)
    with pytest.raises(RuntimeError):
        step_of(gm, model, x[:, :2], t)
    assert not any(module._forward_hooks for module in model.modules())


def test_misuse_is_told() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) + self.layer(x[:1])
            return out

    model = Uneven()
    with pytest.raises(CaptureError, match=r"layer .*\[1, 6\]"):
        step_of(seng_maker(model), model, torch.randn(N, 4), classes())
    linear = nn.Linear(4, 3)
    with pytest.raises(CaptureError, match="unsqueeze"):
        step_of(seng_maker(linear), linear, torch.randn(4), torch.tensor(1))
    config = PreconditioningConfig()
    for name in ("sketching_size", "truncated_rank"):
        with pytest.raises(ConfigError, match=name):
            SengGradientMaker(linear, config, **{name: 0})
    with pytest.raises(ConfigError, match="ema_decay"):
        SengGradientMaker(linear, PreconditioningConfig(ema_decay=0.5))
