"""CurveBallGradientMaker (Henriques, Ehrhardt, Albanie and Vedaldi 2019, "Small steps and giant
leaps: Minimal Newton solvers for deep learning").

A Newton step solved by one step of gradient descent for each step of training: the descent
direction z is kept, and improved on the quadratic model of the newest batch, with Ĥ = H + λI,

    Δ = Ĥ z + g,    z ← ρ z − β Δ,    w ← w + z.

Unless they are given, ρ and β are those that minimise the model gᵀz + ½ zᵀĤz over both:

    [ΔᵀĤΔ  zᵀĤΔ] [ β]   [gᵀΔ]
    [zᵀĤΔ  zᵀĤz] [−ρ] = [gᵀz].

H is the Gauss-Newton matrix JᵀH_L J (J of the logits, H_L the loss's Hessian there), as in the
paper, or the Hessian itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.errors import ConfigError
from distcurv.makers.derivatives import Tensors, flat, gradient, pulled, pushed, shaped
from distcurv.makers.every_step import check_every_step, check_no_average
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.saved_tensors import fitting_tensors

GAUSS_NEWTON, HESSIAN = "gauss_newton", "hessian"


@dataclass(frozen=True)
class CurveBallGradientConfig(PreconditioningConfig):
    """Settings of `CurveBallGradientMaker`, see there.

    Attributes:
        damping: lambda > 0.
        momentum, momentum_decay: β and ρ; both or neither.
    """

    damping: float = 1e-7
    momentum: float | None = None
    momentum_decay: float | None = None


class CurveBallGradientMaker(PreconditionedGradientMaker):
    """Leaves −z in ``.grad``: plain SGD with a learning rate of 1 makes the paper's step.

    g is what is in ``.grad`` after the backward; the products with H come from a run of their own
    that leaves buffers alone (dropout draws anew), and are averaged over the ranks of
    DistributedDataParallel.  Modules of ``ignore_modules`` keep their gradients.

    For the Gauss-Newton matrix the loss must be a function of the logits (see
    ``setup_logits_repr``: the very tensor of the output of which the loss is made); with an output
    that is a tensor, of the output.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: with the damping λ, which is constant; without intervals and ``ema_decay``.
        momentum: β, the step on the quadratic model.  (In ASDL, whose name it has, it is 0.9: above
            twice the inverse of H's largest eigenvalue z grows without bound.)
        momentum_decay: ρ, how much of z is kept.  Give both, or neither for the paper's.
        curvature: ``gauss_newton`` or ``hessian``; the latter with given β and ρ, since the model
            of an indefinite matrix has no minimum.

    Raises `ConfigError` for arguments that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        momentum: float | None = None,
        momentum_decay: float | None = None,
        curvature: str = GAUSS_NEWTON,
    ) -> None:
        super().__init__(model, config)
        who = type(self).__name__
        self.require_parameters()
        check_every_step(config, who)
        check_no_average(config, who)
        if isinstance(config, CurveBallGradientConfig):
            momentum = config.momentum if momentum is None else momentum
            momentum_decay = config.momentum_decay if momentum_decay is None else momentum_decay
        if (momentum is None) != (momentum_decay is None):
            raise ConfigError(
                f"{who} got momentum {momentum} and momentum_decay {momentum_decay}: give both, or "
                "neither for those that minimise the quadratic model"
            )
        if curvature not in (GAUSS_NEWTON, HESSIAN):
            raise ConfigError(f"curvature is {curvature!r}: use {GAUSS_NEWTON!r} or {HESSIAN!r}")
        if curvature == HESSIAN and momentum is None:
            raise ConfigError(
                f"curvature {HESSIAN!r} may be indefinite, and then the quadratic model has no "
                "minimum: give momentum and momentum_decay"
            )
        self.momentum = momentum
        self.momentum_decay = momentum_decay
        self.curvature = curvature

    def precondition(self) -> None:
        """Improve z, and write −z."""
        named = self.chosen_parameters()
        params = [*named.values()]
        product = self._damped_product(params)
        with torch.no_grad():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            g = flat(grads)
            keys = [f"momentum.{name}" for name in named]
            z = flat([self.state.get(key, 0 * own) for key, own in zip(keys, grads, strict=True)])
            Hz = product(z)
            delta = Hz + g
            if self.momentum is None or self.momentum_decay is None:
                beta, rho = best_coefficients(g, z, delta, Hz, product(delta))
            else:
                beta, rho = z.new_tensor(self.momentum), z.new_tensor(self.momentum_decay)
            z = rho * z - beta * delta
            for key, parameter, part in zip(keys, params, shaped(z, params), strict=True):
                self.state[key] = part.clone()
                parameter.grad = -part

    def _damped_product(self, params: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
        """v -> (H + λI) v, flat vectors."""
        local = self._gauss_newton(params) if self.curvature == GAUSS_NEWTON else None
        if local is None:
            grads = gradient(self.run_loss()[1], params, create_graph=True)

        def product(v: Tensor) -> Tensor:
            tangents = shaped(v, params)
            found = flat(pulled(grads, params, tangents) if local is None else local(tangents))
            self.average_over_ranks([found])
            return found + self.config.damping * v

        return product

    def _gauss_newton(self, params: list[nn.Parameter]) -> Callable[[Tensors], Tensors]:
        """v -> JᵀH_L J v, of this rank's samples."""
        output, loss = self.run_loss()
        logits = output if isinstance(output, Tensor) else self._dummy_logits.eval(output)
        slope = None
        if isinstance(logits, Tensor) and logits.requires_grad:
            (slope,) = torch.autograd.grad(loss, [logits], create_graph=True, allow_unused=True)
        if slope is None or not slope.requires_grad:
            raise ConfigError(
                f"{type(self).__name__} finds no curvature of the loss in the logits: say with "
                "setup_logits_repr which tensor of the model's output the loss is made of (the "
                "tensor itself, not a view of it)"
            )

        def product(tangents: Tensors) -> Tensors:
            moved = pushed([logits], params, tangents)
            return pulled([logits], params, pulled([slope], [logits], moved))

        return product

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker for the same model; raises `StateError`
        for another one."""
        named = self.chosen_parameters()
        shapes = {f"momentum.{name}": tuple(p.shape) for name, p in named.items()}
        device = next(iter(named.values())).device
        tensors = fitting_tensors(state_dict, shapes, (), device, type(self).__name__)
        super().load_state_dict({"step": state_dict.get("step"), **tensors})


def best_coefficients(
    g: Tensor, z: Tensor, delta: Tensor, Hz: Tensor, Hdelta: Tensor
) -> tuple[Tensor, Tensor]:
    """(β, ρ) that minimise the quadratic model, from flat vectors; ρ = 0 while z is 0.

    The two vectors are scaled to length 1 before, and where they are one direction the smallest
    of the solutions is taken."""
    dtype = g.dtype
    g, z, delta, Hz, Hdelta = (v.double() for v in (g, z, delta, Hz, Hdelta))
    lengths = torch.stack([delta.norm(), z.norm()])
    lengths = torch.where(lengths > 0, lengths, 1.0)
    matrix = torch.stack([delta @ Hdelta, z @ Hdelta, z @ Hdelta, z @ Hz]).view(2, 2)
    rhs = torch.stack([g @ delta, g @ z])
    inverse = torch.linalg.pinv(
        matrix / torch.outer(lengths, lengths), rtol=torch.finfo(dtype).eps, hermitian=True
    )
    solved = (inverse @ (rhs / lengths)) / lengths
    return solved[0].to(dtype), -solved[1].to(dtype)
