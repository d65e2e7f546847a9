"""Preconditioner: K-FAC over any base optimizer, with its inverses made by the service.

`step()` rewrites the ``.grad`` of the covered layers with G^-1 grad A^-1 of the installed
versions; what is not covered is left to the base optimizer as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.config import KfacConfig, Schedule
from distcurv.curvature.apply import finish
from distcurv.errors import ConfigError
from distcurv.layers.shards import block_shard
from distcurv.train import checkpoint, coverage, fingerprint, metrics
from distcurv.train.activations import ActivationSource
from distcurv.train.capture import Capture
from distcurv.train.captured_block import Watched
from distcurv.train.closures import StepGuard
from distcurv.train.eager import uncompiled
from distcurv.train.likelihoods import Likelihood
from distcurv.train.log import Record
from distcurv.train.pipeline import Pipeline
from distcurv.train.planning import device_of, owned_parameters, plan_blocks, reasons
from distcurv.train.provider import Workers
from distcurv.train.rewrite import Rewriter
from distcurv.train.same_parameters import SameParameters
from distcurv.train.step_settings import StepSettings
from distcurv.train.summary import Summary
from distcurv.train.terms import Terms

log = logging.getLogger("distcurv.train")


class Preconditioner:
    """Asynchronous K-FAC (Martens & Grosse 2015) over a base optimizer.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        config: settings, the same on all ranks.
        workers: ``0``/``"inline"``, ``"auto"`` (the endpoints of ``DISTCURV_ENDPOINTS``, else one
            worker on each node where `distcurv.train.placement` finds that it pays and a core is
            free, else in process) or a list of endpoints.
        grad_scaler: the AMP scaler that the loss is scaled with.  Call
            ``scaler.unscale_(optimizer)`` before `step`.
        replay: install log of an earlier run to follow exactly.

    Raises `ConfigError` when the model has no layer that can be preconditioned.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KfacConfig | None = None,
        workers: Workers = "auto",
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        replay: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.config = config if config is not None else KfacConfig()
        self._model = model
        self._blocks, self.uncovered = plan_blocks(model, self.config)
        if self.uncovered:
            log.warning("left to the base optimizer: %s", reasons(self.uncovered))
        self._settings = StepSettings(self.config, self._blocks)
        self._pipeline = Pipeline(
            [block.spec for block in self._blocks],
            self.config,
            device=device_of(self._blocks),
            replicated=False,
            workers=workers,
            inline_fallback=False,
            replay=replay,
        )
        table, group = self._pipeline.table, self._pipeline.group
        self._shards = {
            index: shard
            for index, (found, bias, *_) in enumerate(self._blocks)
            if (shard := block_shard(found.module, found.layer, bias)) is not None
        }
        group.agree(
            "the settings of single blocks",
            fingerprint.of_text(str([block.config.description() for block in self._blocks])),
            "give all ranks the same KfacConfig.overrides",
        )
        self._workers = coverage.told_workers(group, table, self._pipeline.lanes)
        self._source = self._activation_source(grad_scaler)
        self._rewriter = Rewriter(
            table.specs,
            self.config,
            self._pipeline.device,
            grafts=[block.config.graft for block in self._blocks],
            shards=self._shards,
        )
        self._params = owned_parameters(self._blocks)
        self._same = SameParameters("the Preconditioner", self._params)
        self._guard = StepGuard(id(module.get_parameter(name)) for module, name in self._params)
        self._source.arm_if_due()

    def _activation_source(self, grad_scaler: torch.amp.GradScaler | None) -> ActivationSource:
        watched: dict[str, Watched] = {}
        indices: dict[str, int] = {}
        for index, (found, _, _, _, spec) in enumerate(self._blocks):
            if found.source != "gradient":
                calls = found.source == "calls"
                watched[found.name] = Watched(found.module, found.layer, spec, calls, found.tied)
                indices[found.name] = index
        configs = {block.found.name: block.config for block in self._blocks}
        capture = Capture(
            watched,
            loss_reduction=self.config.loss_reduction,
            accumulation=self.config.accumulation,
            grad_scaler=grad_scaler,
            fisher_type=self.config.fisher_type,
            weight_sharing={name: configs[name].weight_sharing for name in watched},  # type: ignore[misc]
            max_rows={name: configs[name].resolved_max_rows for name in watched},
            seed=self.config.seed + self._pipeline.group.rank,
        )
        by_gradient = [
            i
            for i, block in enumerate(self._blocks)
            if block.found.source != "module" and i not in self._shards
        ]
        return ActivationSource(
            capture, indices, self._pipeline, by_gradient, sharded=bool(self._shards)
        )

    @property
    def damping(self) -> float:
        """The damping of the next `step`, of all blocks without their own; may be set between two
        steps to a number or to a function of the step, alike on all ranks.

        Setting it raises `ConfigError` for the kind ``dense``, whose damping is part of what is
        published, and for a number that is not > 0."""
        return self._settings.damping(self._pipeline.step_count)

    @damping.setter
    def damping(self, damping: float | Schedule) -> None:
        self._settings.set_damping(damping, self._pipeline.step_count)

    @property
    def lr(self) -> float | None:
        """The learning rate that ``kl_clip`` uses at the next `step`; may be set as `damping`, and
        to None."""
        return self._settings.lr(self._pipeline.step_count)

    @lr.setter
    def lr(self, lr: float | Schedule | None) -> None:
        self._settings.set_lr(lr, self._pipeline.step_count)

    # -- the step -------------------------------------------------------------------------

    def sample(
        self,
        logits: Tensor,
        likelihood: str | Likelihood,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """For ``fisher_type="mc"`` and ``"exact"``: between forward and ``backward()``, see
        `distcurv.train.fisher.Fisher.sample`."""
        self._source.capture.sample(logits, likelihood, n_samples, generator, targets)

    def count_terms(self, terms: Terms, divisor: Terms | None = None) -> None:
        """For ``fisher_type="empirical"``: how many terms (unmasked tokens, ...) the loss counts;
        between forward and ``backward()``, see `distcurv.train.fisher.Fisher.count_terms`."""
        self._source.capture.count_terms(terms, divisor)

    @property
    def source(self) -> ActivationSource:
        """What watches the model's forwards and backwards."""
        return self._source

    def observe_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        likelihood: str | Likelihood,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """For any ``fisher_type``: what the loss is; between forward and ``backward()``, see
        `distcurv.train.fisher.Fisher.observe_loss`."""
        self._source.capture.observe_loss(logits, targets, likelihood, n_samples, generator)

    @uncompiled
    @torch.no_grad()
    def step(self, lr: float | None = None, *, factor: float = 1.0) -> None:
        """Rewrite ``.grad`` of the covered layers; call it after ``backward()`` (and after the
        reduction over ranks) and before ``optimizer.step()``, once per training step.

        Gradients may be clipped before it (then what is preconditioned is bounded) or after it
        (then the update is bounded); the statistics of layers are those of the plain loss anyhow,
        see docs/guides/settings.md.

        Args:
            lr: learning rate for ``kl_clip``; None uses the ``lr`` attribute.
            factor: what is rewritten is multiplied with it, before ``kl_clip`` bounds it.

        Raises `StateError` where no backward has come since the last step, where an optimizer
        evaluates its closure again (torch.optim.LBFGS), or where the model has other parameters
        than at the start (`fully_shard` afterwards).
        """
        self._same.check()
        step = self._pipeline.step_count
        dampings = self._settings.dampings(step)
        lr = self.lr if lr is None else lr
        if lr is None and self.config.kl_clip is not None:
            raise ConfigError(
                "KfacConfig.kl_clip needs a learning rate: set KfacConfig.lr, the lr "
                "attribute, or call step(lr=...)"
            )
        self._guard.begin(self._grads())
        grads = {
            block: grad
            for block, (found, bias, *_) in enumerate(self._blocks)
            if (grad := found.layer.gradient(found.module, bias)) is not None
        }
        self._source.finish(grads)
        lr = lr if lr is None else lr * abs(factor)
        clip = [lr] if self.config.kl_clip is not None and lr is not None else []
        # Parts of sharded gradients differ between the ranks.
        whole = [grad.weight_OD for block, grad in grads.items() if block not in self._shards]
        self._pipeline.step(whole, [*dampings, *clip])
        usable = {block: grad for block, grad in grads.items() if self._usable(block)}
        self._rewriter.rewrite(usable, self._pipeline.installed, dampings, lr)
        for block, grad in usable.items():
            found, bias, *_ = self._blocks[block]
            if factor != 1.0:
                finish(grad, None, torch.tensor(factor))
            found.layer.write_gradient(found.module, bias, grad)
        self._guard.end(self._grads())
        self._source.arm_if_due()

    def _grads(self) -> list[Tensor | None]:
        """The ``.grad`` of the covered parameters."""
        params = (module._parameters[name] for module, name in self._params)
        return [None if param is None else param.grad for param in params]

    def _usable(self, block: int) -> bool:
        if self._pipeline.installed[block].version == 0:
            return False
        return self.config.staleness_policy == "keep" or not self._pipeline.too_stale(block)

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Installed versions, damping and learning rate (None where a function of the step says
        it); local, the same on every rank."""
        return checkpoint.save(self._pipeline) | self._settings.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; call it on all ranks at the same step."""
        checkpoint.load(self._pipeline, state)
        self._settings.load({name: state[name] for name in ("damping", "lr")})
        self._source.arm_if_due()

    @property
    def install_log(self) -> list[Record]:
        """(step, block, version, folded_from, folded_through) of every install."""
        return self._pipeline.install_log.records()

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, by the index that the install log uses."""
        return [block.spec.name for block in self._blocks]

    def metrics(self) -> dict[str, float | int]:
        """Counters of this rank, see `distcurv.train.metrics.collect`; and
        ``statistics_nonfinite``, what was captured and counts as zeros because it was not finite,
        or its step's gradients overflowed under AMP."""
        nonfinite = self._source.nonfinite
        return metrics.collect(self._pipeline) | {"statistics_nonfinite": nonfinite}

    def summary(self) -> Summary:
        """Every parameter, its block and how that is served, or why it has none; local.  ``str()``
        of it is a table, its ``rows`` are the data."""
        rows = coverage.block_rows(self._pipeline.table, self._workers)
        return coverage.kfac_summary(self._model, self._blocks, self.uncovered, rows)

    def close(self) -> None:
        """End threads, links and hooks; local and idempotent."""
        self._source.disarm()
        self._guard.close()
        self._pipeline.close()

    def __enter__(self) -> Preconditioner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
