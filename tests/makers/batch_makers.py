"""Models and dense float64 definitions for the makers that work on one batch at a time.

`DEFINITIONS` says for each what ``.grad`` must be after one step, from plain autograd alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dense_derivatives import flat, hessian, jacobian, row, sample_gradients, trained
from torch import Tensor, nn

from distcurv.makers.curve_ball import CurveBallGradientConfig, CurveBallGradientMaker
from distcurv.makers.newton import NewtonGradientConfig, NewtonGradientMaker
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.seng import SengGradientMaker
from distcurv.makers.smw import SmwEmpNaturalGradientConfig, SmwEmpNaturalGradientMaker

N, DAMPING = 6, 0.05


class Mixed(nn.Module):
    """Tokens [N, T] through layers of all kinds; a layer is used twice, one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        out: Tensor = self.head(h)
        return out


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(N, 4), classes()


def conv() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 2, (1, 2), padding="same", dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    return model, torch.randn(N, 2, 5, 5), classes()


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    return Mixed(), torch.randint(0, 5, (N, 4)), torch.randint(0, 3, (N, 4))


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 1, 0, 2])


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "mlp": mlp,
    "conv": conv,
    "tokens": tokens,
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, inputs, classes); the model in the default dtype."""
    torch.manual_seed(seed)
    return MODELS[name]()


def loss_of(y: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy over [N, C] or [N, T, C]."""
    return F.cross_entropy(y.reshape(-1, y.shape[-1]), t.reshape(-1), reduction=reduction)


def setup(gm: PreconditionedGradientMaker, call: Any, x: Tensor, t: Tensor) -> None:
    gm.setup_loss_call(loss_of, gm.setup_model_call(call, x), t)


def step_of(gm: PreconditionedGradientMaker, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """One step: ``.grad`` as one vector."""
    model.zero_grad()
    setup(gm, gm.model, x, t)
    gm.forward_and_backward()
    return gradient_of(model)


def gradient_of(model: nn.Module) -> Tensor:
    grads = [p.grad for p in trained(model)]
    assert all(g is not None for g in grads)
    return flat([g for g in grads if g is not None]).detach().clone()


# -- definitions ----------------------------------------------------------------------------


def samples_of(model: nn.Module, x: Tensor, t: Tensor, params: list[Any]) -> Tensor:
    """[N, P]"""
    return sample_gradients(lambda n: loss_of(model(x[n : n + 1]), t[n : n + 1]), len(x), params)


def smw(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    rows = samples_of(model, x, t, trained(model))
    F_emp = rows.T @ rows / len(x)
    return torch.linalg.solve(F_emp + DAMPING * torch.eye(len(F_emp)), rows.mean(0))


def newton(model: nn.Module, x: Tensor, t: Tensor, absolute: bool = False) -> Tensor:
    H = hessian(loss_of(model(x), t), trained(model))
    if absolute:
        values, vectors = torch.linalg.eigh(H)
        H = vectors @ torch.diag(values.abs()) @ vectors.T
    g = row(loss_of(model(x), t), trained(model))
    return torch.linalg.solve(H + DAMPING * torch.eye(len(g)), g)


def gauss_newton(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """JᵀH_L J, [P, P], by the whole Jacobian and the whole Hessian of the loss."""
    y = model(x)
    J = jacobian(y, trained(model))
    leaf = y.detach().requires_grad_()
    return J.T @ hessian(loss_of(leaf, t), [leaf]) @ J


def curve_ball(model: nn.Module, x: Tensor, t: Tensor, z: Tensor | None = None) -> Tensor:
    """−z' of the paper's step from z, with ρ and β by minimising the model over a dense basis."""
    g = row(loss_of(model(x), t), trained(model))
    H = gauss_newton(model, x, t) + DAMPING * torch.eye(len(g))
    z = torch.zeros_like(g) if z is None else z
    delta = H @ z + g
    basis = torch.stack([z, delta], 1) if z.any() else delta.unsqueeze(1)
    return basis @ torch.linalg.solve(basis.T @ H @ basis, basis.T @ g)


def seng(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Each layer with factors by its own dense empirical Fisher; the others' gradients."""
    parts: dict[Any, Tensor] = {}
    for module in model.modules():
        params = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if params and isinstance(module, nn.Linear | nn.Conv2d):
            rows = samples_of(model, x, t, params)
            F_l = rows.T @ rows / len(x)
            solved = torch.linalg.solve(F_l + DAMPING * torch.eye(len(F_l)), rows.mean(0))
            for p, part in zip(params, solved.split([p.numel() for p in params]), strict=True):
                parts[p] = part
        else:
            parts.update({p: row(loss_of(model(x), t), [p]) for p in params})
    return flat([parts[p] for p in trained(model)])


def newton_maker(model: nn.Module, **settings: Any) -> PreconditionedGradientMaker:
    return NewtonGradientMaker(model, NewtonGradientConfig(damping=DAMPING, **settings))


def absolute_maker(model: nn.Module, **settings: Any) -> PreconditionedGradientMaker:
    config = NewtonGradientConfig(damping=DAMPING, absolute=True, **settings)
    return NewtonGradientMaker(model, config)


def smw_maker(model: nn.Module, **settings: Any) -> PreconditionedGradientMaker:
    config = SmwEmpNaturalGradientConfig(damping=DAMPING, **settings)
    return SmwEmpNaturalGradientMaker(model, config)


def curve_ball_maker(model: nn.Module, **settings: Any) -> PreconditionedGradientMaker:
    return CurveBallGradientMaker(model, CurveBallGradientConfig(damping=DAMPING, **settings))


def seng_maker(model: nn.Module, **settings: Any) -> PreconditionedGradientMaker:
    return SengGradientMaker(model, PreconditioningConfig(damping=DAMPING, **settings))


Maker = Callable[..., PreconditionedGradientMaker]
DEFINITIONS: dict[str, tuple[Maker, Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "smw": (smw_maker, smw),
    "newton": (newton_maker, newton),
    "newton absolute": (absolute_maker, lambda m, x, t: newton(m, x, t, absolute=True)),
    "curve ball": (curve_ball_maker, curve_ball),
    "seng": (seng_maker, seng),
}
