"""NewtonGradientMaker: (H + λI)⁻¹ g with the dense Hessian, or its absolute value |H|.

|H| has the eigenvectors of H and the absolute values of its eigenvalues (Dauphin et al. 2014,
"Identifying and attacking the saddle point problem", saddle-free Newton), so that the step leads
downhill.  P² numbers and P³ operations for P parameters: for small models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.errors import NumericsError
from distcurv.makers.derivatives import dense, flat, gradient, shaped
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.saved_tensors import fitting_tensors


@dataclass(frozen=True)
class NewtonGradientConfig(PreconditioningConfig):
    """Settings of `NewtonGradientMaker`.

    Attributes:
        damping: lambda > 0.
        absolute: |H| instead of H.
    """

    damping: float = 1e-8
    absolute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("absolute", isinstance(self.absolute, bool), "give True or False")


class NewtonGradientMaker(PreconditionedGradientMaker):
    """Rewrites ``.grad`` to (H + λI)⁻¹ g, for all trained parameters together.

    H is the Hessian of the loss of a step at which curvature is due, made by a second run of the
    model that leaves buffers alone (dropout draws anew); averaged over the ranks of
    DistributedDataParallel, and over steps with ``ema_decay``.  Before the first update, and in
    modules of ``ignore_modules``, gradients stay as they are.  Solved in float64.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: `NewtonGradientConfig`, or another `PreconditioningConfig` for H.

    Raises `ConfigError` where no parameter is left, `NumericsError` for a singular matrix.
    """

    def __init__(self, model: nn.Module, config: PreconditioningConfig) -> None:
        super().__init__(model, config)
        self.require_parameters()
        self.absolute = isinstance(config, NewtonGradientConfig) and config.absolute

    def update_curvature(self) -> None:
        """``hessian`` [P, P], the newest or its running average."""
        params = [*self.chosen_parameters().values()]
        _, loss = self.run_loss()
        hessian = dense(gradient(loss, params, create_graph=True), params)
        self.average_over_ranks([hessian])
        before, weight = self.state.get("hessian"), self.config.ema_decay
        if before is not None and weight is not None:
            hessian = torch.lerp(before, hessian, weight)
        self.state["hessian"] = hessian

    def update_preconditioner(self) -> None:
        """The LU decomposition of the damped matrix, ``lu`` and ``pivots``."""
        hessian: Tensor | None = self.state.get("hessian")
        if hessian is None:
            return
        matrix = hessian.double()
        matrix = (matrix + matrix.mT) / 2
        if self.absolute:
            values, vectors = torch.linalg.eigh(matrix)
            matrix = (vectors * values.abs()) @ vectors.mT
        matrix.diagonal().add_(self.config.damping)
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        if info.any() or not lu.isfinite().all():
            raise NumericsError(
                f"the Hessian of {len(matrix)} parameters plus {self.config.damping:g} is singular "
                "or not finite: raise NewtonGradientConfig.damping"
            )
        self.state["lu"], self.state["pivots"] = lu, pivots

    @torch.no_grad()
    def precondition(self) -> None:
        """Solve with the newest decomposition."""
        if "lu" not in self.state:
            return
        params = [*self.chosen_parameters().values()]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        rhs = flat(grads).double().unsqueeze(-1)
        solved = torch.linalg.lu_solve(self.state["lu"], self.state["pivots"], rhs).squeeze(-1)
        for parameter, part in zip(params, shaped(solved, params), strict=True):
            parameter.grad = part.to(parameter.dtype)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker for the same model; raises `StateError`
        for another one."""
        params = [*self.chosen_parameters().values()]
        total = sum(p.numel() for p in params)
        shapes = {"hessian": (total, total), "lu": (total, total), "pivots": (total,)}
        who = type(self).__name__
        tensors = fitting_tensors(state_dict, shapes, (), params[0].device, who)
        super().load_state_dict({"step": state_dict.get("step"), **tensors})
