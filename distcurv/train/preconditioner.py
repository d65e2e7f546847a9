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

from distcurv.config import KfacConfig
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.curvature.statistics import resolve_encoding
from distcurv.errors import ConfigError
from distcurv.train import checkpoint, metrics
from distcurv.train.activations import ActivationSource
from distcurv.train.capture import Capture
from distcurv.train.discover import FoundLayer, find_layer_blocks
from distcurv.train.likelihood import Likelihood
from distcurv.train.log import Record
from distcurv.train.pipeline import Pipeline
from distcurv.train.provider import Workers
from distcurv.train.rewrite import Rewriter

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
        self._damping = self.config.damping
        self.lr = self.config.lr
        self._layers, self.uncovered = find_layer_blocks(model, self.config.ignore_modules)  # type: ignore[arg-type]
        if not self._layers:
            raise ConfigError(
                "the model has no layer that can be preconditioned; left out: "
                + "; ".join(f"{u.name} ({u.reason})" for u in self.uncovered)
            )
        if self.uncovered:
            log.warning(
                "left to the base optimizer: %s",
                "; ".join(f"{u.name} ({u.reason})" for u in self.uncovered),
            )
        self._bias = [found.layer.trains_bias(found.module) for found in self._layers]
        self._pipeline = Pipeline(
            [self._spec(found, bias) for found, bias in zip(self._layers, self._bias, strict=True)],
            self.config,
            device=_device(self._layers),
            replicated=False,
            workers=workers,
            inline_fallback=False,
            replay=replay,
        )
        table = self._pipeline.table
        capture = Capture(
            {
                found.name: (found.module, found.layer, spec)
                for found, spec in zip(self._layers, table.specs, strict=True)
            },
            loss_reduction=self.config.loss_reduction,
            accumulation=self.config.accumulation,
            grad_scaler=grad_scaler,
            fisher_type=self.config.fisher_type,
            weight_sharing=self.config.weight_sharing,  # type: ignore[arg-type]
            max_rows=self.config.resolved_max_rows,
            seed=self.config.seed + self._pipeline.group.rank,
        )
        indices = {found.name: block for block, found in enumerate(self._layers)}
        self._source = ActivationSource(capture, indices, self._pipeline)
        self._rewriter = Rewriter(table.specs, self.config, self._pipeline.device)
        self._source.arm_if_due()

    def _spec(self, found: FoundLayer, bias: bool) -> BlockSpec:
        config = self.config
        sides = []
        for dim, tail in zip(
            found.layer.dims(found.module, bias), (config.tail_in, config.tail_out), strict=True
        ):
            if config.kind == "dense":
                sides.append(SideSpec(dim, dim, "none", "dense"))
                continue
            rank = min(config.rank, dim)
            sides.append(
                SideSpec(dim, rank, tail, resolve_encoding(dim, rank, tail, config.encoding))
            )
        return BlockSpec(
            found.name,
            config.kind,
            tuple(sides),
            config.factor_decay,
            config.damping,
            config.damping_form == "relative",
        )

    @property
    def damping(self) -> float:
        """The damping of the next `step`; may be set between two steps, for a schedule.

        Setting it raises `ConfigError` for the kind ``dense``, whose damping is part of what is
        published, and for a number that is not > 0."""
        return self._damping

    @damping.setter
    def damping(self, damping: float) -> None:
        if self.config.kind == "dense":
            raise ConfigError(
                "the damping of kind 'dense' is fixed when the preconditioner is made: set "
                "KfacConfig.damping, or use kind='lowrank'"
            )
        if not 0 < damping < float("inf"):
            raise ConfigError(f"damping is {damping}: give a number > 0")
        self._damping = damping

    # -- the step -------------------------------------------------------------------------

    def sample(
        self,
        logits: Tensor,
        likelihood: str | Likelihood,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """For ``fisher_type="mc"``: between forward and ``backward()``, see `Capture.sample`."""
        self._source.capture.sample(logits, likelihood, n_samples, generator)

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Rewrite ``.grad`` of the covered layers; call it after ``backward()`` (and after the
        reduction over ranks) and before ``optimizer.step()``, once per training step.

        Args:
            lr: learning rate for ``kl_clip``; None uses the ``lr`` attribute.
        """
        lr = self.lr if lr is None else lr
        if lr is None and self.config.kl_clip is not None:
            raise ConfigError(
                "KfacConfig.kl_clip needs a learning rate: set KfacConfig.lr, the lr "
                "attribute, or call step(lr=...)"
            )
        self._source.finish()
        grads = {
            block: grad
            for block, (found, bias) in enumerate(zip(self._layers, self._bias, strict=True))
            if (grad := found.layer.gradient(found.module, bias)) is not None
        }
        self._pipeline.step([grad.weight_OD for grad in grads.values()])
        usable = {block: grad for block, grad in grads.items() if self._usable(block)}
        self._rewriter.rewrite(usable, self._pipeline.installed, self.damping, lr)
        for block, grad in usable.items():
            found = self._layers[block]
            found.layer.write_gradient(found.module, self._bias[block], grad)
        self._source.arm_if_due()

    def _usable(self, block: int) -> bool:
        if self._pipeline.installed[block].version == 0:
            return False
        return self.config.staleness_policy == "keep" or not self._pipeline.too_stale(block)

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Installed versions, damping and learning rate; local, the same on every rank."""
        return checkpoint.save(self._pipeline) | {"damping": self.damping, "lr": self.lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; call it on all ranks at the same step."""
        checkpoint.load(self._pipeline, state)
        self._damping, self.lr = state["damping"], state["lr"]
        self._source.arm_if_due()

    @property
    def install_log(self) -> list[Record]:
        """(step, block, version, folded_from, folded_through) of every install."""
        return self._pipeline.install_log.records()

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, by the index that the install log uses."""
        return [found.name for found in self._layers]

    def metrics(self) -> dict[str, float | int]:
        """Counters of this rank, see `distcurv.train.metrics.collect`; and
        ``statistics_nonfinite``, the captured calls that were not finite and count as zeros."""
        nonfinite = self._source.capture.nonfinite
        return metrics.collect(self._pipeline) | {"statistics_nonfinite": nonfinite}

    def close(self) -> None:
        """End threads, links and hooks; local and idempotent."""
        self._source.disarm()
        self._pipeline.close()

    def __enter__(self) -> Preconditioner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _device(layers: Sequence[FoundLayer]) -> torch.device:
    devices = {p.device for found in layers for p in found.module.parameters(recurse=False)}
    if len(devices) != 1:
        raise ConfigError(
            f"the covered layers are on {sorted(map(str, devices))}: put them on one device"
        )
    return devices.pop()
