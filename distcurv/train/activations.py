"""Statistics from activations: arms the capture on due steps and adds what it delivers; where it
delivers nothing of a block that no module stands for, its gradient makes the statistic.

Between two steps the capture is armed only while statistics are due, so other steps run as if
distcurv were not there.  With AMP's loss scale what a step shows is held back until it is known
that the step counts, see `HeldStatistics`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
from torch import nn

from distcurv.config import SoapConfig
from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.spec import Tensors
from distcurv.train.capture import Capture
from distcurv.train.captured_block import Watched
from distcurv.train.discover import find_layer_blocks
from distcurv.train.gradient_source import gradient_statistic
from distcurv.train.overflow import HeldStatistics
from distcurv.train.pipeline import Pipeline

log = logging.getLogger("distcurv.train")

_STEPS_UNTIL_TOLD = 10  # steps with statistics


class ActivationSource:
    """Feeds a pipeline's window from a capture.

    Args:
        capture: over the watched blocks, by name.
        indices: table index of each watched block.
        pipeline: where the statistics go.
        by_gradient: the blocks whose gradient makes the statistic where capture shows none of
            them; those that capture does not watch at all are among them.
        sharded: the gradients that `finish` gets are parts, others on every rank.
    """

    def __init__(
        self,
        capture: Capture,
        indices: Mapping[str, int],
        pipeline: Pipeline,
        by_gradient: Collection[int] = (),
        sharded: bool = False,
    ) -> None:
        self.capture = capture
        self._indices = dict(indices)
        self._by_gradient = sorted(by_gradient)
        self._unseen = {name for name, block in indices.items() if block not in self._by_gradient}
        self._steps_seen = 0
        self._pipeline = pipeline
        self.blocks = frozenset(self._indices.values())
        # Every rank counts its share, so that one step of all ranks together is one step.
        share = 1.0 / pipeline.group.world_size
        self._share = torch.tensor(share, dtype=torch.float32, device=pipeline.device)
        scaler = capture.scale.grad_scaler
        self._told = False
        self._held: HeldStatistics | None = None
        if scaler is not None and scaler.is_enabled():
            # A step overflows for all ranks or for none: parts of gradients must be put together.
            self._held = HeldStatistics(scaler, pipeline.group.everywhere if sharded else None)

    @classmethod
    def of_weights(
        cls,
        model: nn.Module,
        block_of: Mapping[int, int],
        pipeline: Pipeline,
        config: SoapConfig,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> ActivationSource:
        """Watch the layers whose weight is a block of its own (no bias coordinate).

        Args:
            block_of: table index by the id of the weight.
            grad_scaler: the AMP scaler that the loss is scaled with.
        """
        found, _ = find_layer_blocks(model)
        watched: dict[str, Watched] = {}
        indices: dict[str, int] = {}
        for layer in found:
            weight = layer.module._parameters.get(layer.layer.weight)
            block = None if weight is None else block_of.get(id(weight))
            if block is not None and layer.layer.weight_is_matrix and layer.layer.rows is None:
                spec = pipeline.table.specs[block]
                watched[layer.name] = Watched(
                    layer.module, layer.layer, spec, layer.source == "calls", layer.tied
                )
                indices[layer.name] = block
        capture = Capture(
            watched,
            accumulation=config.accumulation,
            grad_scaler=grad_scaler,
            max_rows=config.resolved_max_rows,
            seed=config.seed + pipeline.group.rank,
        )
        return cls(capture, indices, pipeline)

    def wait_to_be_told(self) -> None:
        """From now on watch from `begin_step` to `finish` alone: for whoever runs forward and
        backward himself, so that the model may be run otherwise in between."""
        self._told = True
        self.disarm()

    def arm_if_due(self) -> None:
        """Watch the coming forwards if the coming step takes statistics, unless steps are told."""
        if not self._told:
            self.begin_step()

    def begin_step(self) -> None:
        """Watch the coming forwards if the step that begins takes statistics; what has been seen
        since the last one is forgotten."""
        self.disarm()
        if self._pipeline.capture_due and (self._indices or self._by_gradient):
            bases = {
                name: self._pipeline.basis(block).tensors for name, block in self._indices.items()
            }
            self.capture.arm(bases, self._add_named, self._pipeline.step_count)

    @property
    def nonfinite(self) -> int:
        """Statistics so far that were not finite, or of a step that overflowed, and count as
        zeros (waits for the device)."""
        overflowed = self._held.dropped if self._held is not None else 0
        return self.capture.nonfinite + overflowed

    def _add_named(self, name: str, statistic: Tensors) -> None:
        self._add(self._indices[name], statistic)

    def _add(self, block: int, statistic: Tensors) -> None:
        if self._held is not None:
            self._held.add(block, statistic)
        else:
            self._pipeline.add(block, statistic)

    def finish(self, grads: Mapping[int, AffineGradient] | None = None) -> None:
        """End the step's capture and count the step for what was delivered.

        Args:
            grads: by block, reduced and unscaled: where they are not finite the step does not
                count; and for those that gradients make statistics of.  None where a step that
                overflows never comes here.

        Raises `CaptureError` in mode ``mc`` when a backward came without a sample."""
        if not self.capture.is_armed:
            return
        silent = self.capture.finish()
        self._look_for_unseen(silent)
        grads = grads if grads is not None else {}
        shown = {block for name, block in self._indices.items() if name not in silent}
        for block in self._by_gradient:
            if block not in shown and block in grads:
                self._add(block, self._of_gradient(block, grads[block]))
                shown.add(block)
        if self._held is None:
            for block in shown:
                self._pipeline.add(block, {"steps": self._share})
            return
        whole = [part for grad in grads.values() for part in grad if part is not None]
        for block, (statistic, counts) in self._held.take(whole).items():
            self._pipeline.add(block, {**statistic, "steps": self._share * counts})

    def _look_for_unseen(self, silent: frozenset[str]) -> None:
        """Say once of which blocks nothing has been seen: a branch that is not used is one reason,
        transforms that run no hooks (torch.func) are another."""
        self._unseen &= silent
        self._steps_seen += 1
        if self._steps_seen == _STEPS_UNTIL_TOLD and self._unseen:
            log.warning(
                "no statistics of %s in %d steps that took some: unused so far, or used in a way "
                "that capture does not see (torch.func.vmap, ...); gradients stay as they are",
                ", ".join(sorted(self._unseen)),
                _STEPS_UNTIL_TOLD,
            )

    def _of_gradient(self, block: int, grad: AffineGradient) -> Tensors:
        pipeline = self._pipeline
        world = pipeline.group.world_size
        factor = self.capture.scale.fisher_factor(self.capture.terms, world)
        return gradient_statistic(
            pipeline.table.specs[block], grad, factor, 1.0 / world, pipeline.basis(block).tensors
        )

    def disarm(self) -> None:
        """Watch nothing any more."""
        self.capture.disarm()
        if self._held is not None:
            self._held.forget()
