"""PsgdGradientMaker: one dense preconditioner of all parameters, fitted as Li 2018 does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.curvature import psgd
from distcurv.curvature.precision import full_float32
from distcurv.errors import ConfigError
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.saved_tensors import fitting_tensors

Tensors = list[Tensor]


class PsgdGradientMaker(PreconditionedGradientMaker):
    r"""PSGD (Li 2018, "Preconditioned stochastic gradient descent") with a triangle of all P
    trained parameters: P² numbers, for small models.

    An update draws random steps dx, makes dg = H dx + ``damping`` u with further random numbers u,
    and moves Q a little towards the P = QᵀQ with P E[dg dgᵀ] P = E[dx dxᵀ].  So P tends to
    (H² + damping² I)^(-1/2): to |H|⁻¹, bounded by 1 / damping also where H has eigenvalues of
    either sign.  The product with H is a forward and two backwards of the model apart from
    training.  The steps are the same on all ranks; the products are averaged.

    Of the config, ``preconditioner_*`` say when there is an update; ``curvature_*``,
    ``ema_decay`` and ``data_size`` are not read: the fit is the average.  ``seed`` is that of
    the random numbers.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: when and how.
        precond_lr: relative size of an update of Q, 0 < it < 1.
        init_scale: Q begins as this times the identity.
        use_functorch: both ways of ASDL's to make the product are one here.

    Raises `ConfigError` for numbers out of range, or where no parameter is left to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        precond_lr: float = 0.01,
        init_scale: float = 1.0,
        use_functorch: bool = False,
    ) -> None:
        super().__init__(model, config)
        if not 0 < precond_lr < 1:
            raise ConfigError(f"precond_lr is {precond_lr}: give a number between 0 and 1")
        if not init_scale > 0:
            raise ConfigError(f"init_scale is {init_scale}: give a number above 0")
        self.precond_lr = precond_lr
        self.init_scale = init_scale
        self.use_functorch = use_functorch
        # By name, each once.
        self.covered = self.chosen_parameters()
        if not self.covered:
            raise ConfigError(
                f"{type(self).__name__}: the model has no trained parameter outside of "
                "ignore_modules"
            )
        self._device = next(iter(self.covered.values())).device
        self._generator = self._seeded()
        self.state.update(self._initial())
        self.state["generator"] = self._generator.get_state()

    # -- what the Kronecker form does its own way -------------------------------------------

    def _initial(self) -> dict[str, Tensor]:
        """The tensors of the state before the first update."""
        tensors = list(self.covered.values())
        total = sum(p.numel() for p in tensors)
        return {"Q": self.init_scale * torch.eye(total, dtype=wide(tensors), device=self._device)}

    def _fit(self, dx: Tensors, dg: Tensors) -> None:
        q = self.state["Q"]
        self.state["Q"] = psgd.fit(q, _flat(dx).to(q), _flat(dg).to(q), self.precond_lr)

    def _apply(self, grads: Tensors) -> Tensors:
        q = self.state["Q"]
        return list(psgd.apply(q, _flat(grads).to(q)).split([g.numel() for g in grads]))

    def _criterion(self, dx: Tensors, dg: Tensors) -> Tensor:
        q = self.state["Q"]
        return psgd.criterion(q, _flat(dx).to(q), _flat(dg).to(q))

    # -- the step -------------------------------------------------------------------------

    def update_preconditioner(self) -> None:
        """One step of the fit."""
        dx, dg = self._pair(self._generator)
        with torch.no_grad(), full_float32(self._device):
            self._fit(dx, dg)
        self.state["generator"] = self._generator.get_state()

    def precondition(self) -> None:
        """``.grad`` of all covered parameters becomes P times itself; where there is none it
        counts as zeros, and there is none afterwards."""
        params = list(self.covered.values())
        with torch.no_grad(), full_float32(self._device):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            for parameter, new in zip(params, self._apply(grads), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(new.view_as(parameter))

    def criterion(self, n_samples: int = 1) -> float:
        """The mean of dgᵀ P dg + dxᵀ P⁻¹ dx, which the fit minimises, over ``n_samples`` random
        steps, the same at every call, for what is set up.  On all ranks together."""
        if n_samples < 1:
            raise ConfigError(f"n_samples is {n_samples}: give at least 1")
        generator = self._seeded()
        total = 0.0
        for _ in range(n_samples):
            dx, dg = self._pair(generator)
            with torch.no_grad(), full_float32(self._device):
                total += float(self._criterion(dx, dg))
        return total / n_samples

    def _pair(self, generator: torch.Generator) -> tuple[Tensors, Tensors]:
        """Random steps of the covered parameters and the changes of gradient, averaged."""
        params = list(self.covered.values())
        steps, noise = ([_normal(p, generator) for p in params] for _ in range(2))
        by_id = {id(p): step for p, step in zip(params, steps, strict=True)}
        # The covered parameters move, the others stay.
        tangents = [by_id.get(id(p), torch.zeros_like(p)) for p in self.trained]
        products = self.loss_hvp(tangents, accumulate_grad=False)
        own = [
            product.detach().contiguous()
            for p, product in zip(self.trained, products, strict=True)
            if id(p) in by_id
        ]
        self.average_over_ranks(own)
        damping = self.config.damping
        return steps, [h + damping * u for h, u in zip(own, noise, strict=True)]

    def _seeded(self) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(self.config.seed)

    # -- state ----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same maker for the same model; raises `StateError`
        for another one."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._initial().items()}
        shapes["generator"] = tuple(self._generator.get_state().shape)
        who = type(self).__name__
        tensors = fitting_tensors(state_dict, shapes, shapes, self._device, who)
        tensors["generator"] = tensors["generator"].cpu()
        super().load_state_dict({"step": state_dict.get("step"), **tensors})
        self._generator.set_state(self.state["generator"])


def wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """What a preconditioner of such parameters is kept in: float32 or float64."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, dtype=wide([like]), device=like.device)
    return drawn.to(like.dtype)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
