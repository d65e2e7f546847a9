"""NaturalGradientMaker: the gradient times the inverse of a Fisher matrix of some shape.

It is `distcurv.Preconditioner` behind the unified interface: capture, factors, workers, versions
and their invariants are those of the service.  What the maker adds: it reads from the loss call
what the loss is, draws for ``fisher_mc``, and counts updates as `PreconditioningConfig` says.

Sources: Amari 1998, "Natural Gradient Works Efficiently in Learning"; Martens and Grosse 2015,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcurv.errors import ConfigError, StateError
from distcurv.makers.dummy_object import evaluate
from distcurv.makers.fisher_arguments import (
    FISHER_EMP,
    FISHER_EXACT,
    FISHER_MC,
    FISHER_TYPES,
    check_arguments,
)
from distcurv.makers.grad_maker import LOSS_CROSS_ENTROPY
from distcurv.makers.kfac_settings import Newest, in_step_blocks, kfac_config
from distcurv.makers.loss_reading import FixedCount, LossCall, for_sampling, read_call
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.shapes import SHAPE_FULL, Assignment, Rule
from distcurv.makers.swift import SwiftKron
from distcurv.train.capture import Capture
from distcurv.train.discover import bare_model, find_layer_blocks
from distcurv.train.log import Record
from distcurv.train.preconditioner import Preconditioner


class NaturalGradientMaker(PreconditionedGradientMaker):
    """(scale F + damping)^-1 times grad_scale times the gradient.

    F is the Fisher matrix of a single term of the loss (a sample, a token, an output of a
    regression), averaged over the terms that the loss counts, or summed and divided by
    ``config.data_size``.  Read of the loss call: its ``reduction``, and of `F.cross_entropy`,
    `F.mse_loss` and their modules the terms, masked ones (``ignore_index``), class weights and
    label smoothing too.  Of any other loss a sample is a term.  Until a layer's first install
    (there is none to wait for without workers) its gradient is left as it is.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: when and how.
        fisher_type: ``fisher_mc`` (targets drawn from the model's distribution), ``fisher_exact``
            (the generalized Gauss-Newton matrix) or ``fisher_emp`` (the data's targets).
        fisher_shape: a name in `distcurv.makers.shapes.SHAPES`, or a list of names and pairs, see
            `distcurv.makers.shapes.Assignment`.
        loss_type: ``cross_entropy`` or ``mse``: the distribution, for ``fisher_mc`` and
            ``fisher_exact``.
        scale: F is multiplied with it.
        grad_scale: the gradients of the preconditioned layers are multiplied with it.
        n_mc_samples: targets drawn for each term; F is the mean over them.
        var: variance of the normal distribution of ``mse``.
        seed: draw from this seed anew at every step (plus the rank); by default draws go by
            ``config.seed``, the step and the rank.

    Raises `ConfigError` for a value that cannot work, or a model without a layer to precondition.
    """

    served = True

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        fisher_shape: str | Sequence[Rule] = SHAPE_FULL,
        loss_type: str = LOSS_CROSS_ENTROPY,
        scale: float = 1,
        grad_scale: float = 1,
        n_mc_samples: int = 1,
        var: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, config)
        check_arguments(fisher_type, loss_type, scale, grad_scale, n_mc_samples, var, seed)
        self.fisher_type = fisher_type
        self.fisher_shape = fisher_shape
        self.loss_type = loss_type
        self.scale = scale
        self.grad_scale = grad_scale
        self.n_mc_samples = n_mc_samples
        self.var = var
        self.seed = seed
        assignment = Assignment(fisher_shape)
        found, _ = find_layer_blocks(model, tuple(config.ignore_modules or ()))  # type: ignore[arg-type]
        assignment.check(bare_model(model), found)
        own = in_step_blocks(assignment, found)
        if own:
            self.refuse_sharded()
        settings = kfac_config(
            config, assignment, own, fisher_type=FISHER_TYPES[fisher_type], scale=scale
        )
        self.preconditioner: Preconditioner | None = None
        if len(own) < len(found) or not own:
            self.preconditioner = Preconditioner(model, settings, workers=config.workers)
            # What runs apart from `forward_and_backward` is no part of the statistics.
            self.preconditioner.source.wait_to_be_told()
        self.served = self.preconditioner is not None
        self._swift: SwiftKron | None = None
        if own:
            self._swift = SwiftKron(
                own,
                config,
                fisher_type=FISHER_TYPES[fisher_type],
                damping=settings.damping_at(0),
                outputs_add=fisher_type == FISHER_EXACT or n_mc_samples > 1,
            )
            self.state["swift"] = self._swift.state

    # -- the step -------------------------------------------------------------------------

    def do_update_curvature(self, step: int) -> bool:
        """Whether statistics are taken at this step: where there is no average, of the steps that
        ``config`` names the last before an update."""
        if self.config.ema_decay is None:
            return Newest(self._curvature_times, self._preconditioner_times)(step)
        return super().do_update_curvature(step)

    def startup(self) -> None:
        """Watch the forward where this step takes statistics."""
        if self.preconditioner is not None:
            self.preconditioner.source.begin_step()
        if self._swift is not None and self.do_update_curvature(self.state["step"]):
            self._swift.arm()

    def backward(self) -> None:
        """What the Fisher matrix needs of this step, then the loss's backward."""
        if self.do_update_curvature(self.state["step"]):
            self._observe()
        super().backward()

    def update_curvature(self) -> None:
        """Nothing for the service: statistics have been taken in the backward."""
        if self._swift is not None:
            wrapper = self.wrapper
            self._swift.update_curvature(None if wrapper is None else wrapper.process_group)

    def update_preconditioner(self) -> None:
        """Nothing for the service: its windows end at these steps."""
        if self._swift is not None:
            self._swift.update_preconditioner()

    def precondition(self) -> None:
        """Hand the statistics over, install what is due and rewrite ``.grad``."""
        factor = self.grad_scale / self.scale
        if self.preconditioner is not None:
            self.preconditioner.step(factor=factor)
        if self._swift is not None:
            self._swift.precondition(factor)

    @property
    def _captures(self) -> list[Capture]:
        """What is told of the loss."""
        served = None if self.preconditioner is None else self.preconditioner.source
        return [part.capture for part in (served, self._swift) if part is not None]

    def _observe(self) -> None:
        """Tell what the loss is, and draw."""
        call = self._loss_call()
        mean = self.loss_is_mean if call is None else call.is_mean
        for capture in self._captures:
            capture.set_loss_reduction("mean" if mean else "sum")
        if self.fisher_type == FISHER_EMP:
            self._count(call)
            return
        logits = self.logits
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"the logits are {type(logits).__name__}, no tensor: say with setup_logits_repr "
                "where they are in the model's output"
            )
        likelihood, targets = for_sampling(call, self.loss_type, logits, self.var)
        if self.config.data_size is not None:
            likelihood = FixedCount(likelihood, self.config.data_size)
        for capture in self._captures:
            generator = self._generator(logits.device)
            with ExitStack() as others:
                for other in self._captures:
                    if other is not capture:
                        others.enter_context(other.paused())
                capture.sample(logits, likelihood, self.n_mc_samples, generator, targets)

    def _count(self, call: LossCall | None) -> None:
        """The terms of the loss, where they are known or given."""
        size = self.config.data_size
        if call is not None:
            divisor = call.terms()
        elif size is not None:
            logits = self.logits
            if not isinstance(logits, Tensor) or logits.dim() == 0:
                raise ConfigError(
                    "with data_size the number of samples is that of the logits, and these are no "
                    "tensor with a batch dimension: say with setup_logits_repr where they are"
                )
            divisor = len(logits)
        else:
            return
        for capture in self._captures:
            capture.count_terms(divisor if size is None else size, divisor)

    def _loss_call(self) -> LossCall | None:
        if self._loss_fn is None:
            return None
        with torch.no_grad():
            args, kwargs = evaluate((self._loss_fn_args, self._loss_fn_kwargs), self._model_output)
            return read_call(self._loss_fn, args, kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        """A function of the seed, the step and the rank, so that a resumed run draws the same."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        if self.seed is not None:
            return torch.Generator(device).manual_seed(self.seed + rank)
        of_step = hash((self.config.seed, self.state["step"], rank))
        return torch.Generator(device).manual_seed(of_step % (1 << 62))

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step and the installed versions; local."""
        served = None if self.preconditioner is None else self.preconditioner.state_dict()
        return super().state_dict() | {"preconditioner": served}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; call it on all ranks at the same step."""
        served = state_dict.get("preconditioner")
        if (served is None, "swift" in state_dict) != (
            self.preconditioner is None,
            self._swift is not None,
        ):
            raise StateError(
                f"this state_dict has the entries {sorted(state_dict)}: it is not of a "
                f"{type(self).__name__} with the fisher_shape {self.fisher_shape!r}"
            )
        if self._swift is not None:
            self._swift.load(state_dict["swift"])
        if self.preconditioner is not None and served is not None:
            self.preconditioner.load_state_dict(served)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "preconditioner"})
        if self._swift is not None:
            self.state["swift"] = self._swift.state

    # -- what can be asked ----------------------------------------------------------------

    @property
    def install_log(self) -> list[Record]:
        """(step, block, version, folded_from, folded_through) of every install."""
        return [] if self.preconditioner is None else self.preconditioner.install_log

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, by the index that the install log uses."""
        return [] if self.preconditioner is None else self.preconditioner.block_names

    def summary(self) -> str:
        """What is computed where: every parameter, its block and the worker that serves it."""
        lines = [super().summary(), *([] if self._swift is None else self._swift.describe())]
        if self.preconditioner is not None:
            lines.append(str(self.preconditioner.summary()))
        return "\n".join(lines)

    def metrics(self) -> dict[str, float | int]:
        """Counters of the service, see `Preconditioner.metrics`."""
        return {} if self.preconditioner is None else self.preconditioner.metrics()

    def close(self) -> None:
        """End threads, links and hooks; local and idempotent."""
        for part in (self.preconditioner, self._swift):
            if part is not None:
                part.close()
