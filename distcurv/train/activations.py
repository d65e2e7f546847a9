"""Statistics from activations: arms the capture on due steps and adds what it delivers.

Between two steps the capture is armed only while statistics are due, so other steps run as if
distcurv were not there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distcurv.config import ServiceConfig
from distcurv.curvature.spec import Tensors
from distcurv.layers.layer import LayerIO
from distcurv.train.capture import Capture
from distcurv.train.discover import find_layer_blocks
from distcurv.train.pipeline import Pipeline


class ActivationSource:
    """Feeds a pipeline's window from a capture.

    Args:
        capture: over the watched blocks, by name.
        indices: table index of each watched block.
        pipeline: where the statistics go.
    """

    def __init__(self, capture: Capture, indices: Mapping[str, int], pipeline: Pipeline) -> None:
        self.capture = capture
        self._indices = dict(indices)
        self._pipeline = pipeline
        self.blocks = frozenset(self._indices.values())
        # Every rank counts its share, so that one step of all ranks together is one step.
        share = 1.0 / pipeline.group.world_size
        self._share = torch.tensor(share, dtype=torch.float32, device=pipeline.device)

    @classmethod
    def of_weights(
        cls,
        model: nn.Module,
        block_of: Mapping[int, int],
        pipeline: Pipeline,
        config: ServiceConfig,
    ) -> ActivationSource:
        """Watch the layers whose weight is a block of its own (no bias coordinate).

        Args:
            block_of: table index by the id of the weight.
        """
        found, _ = find_layer_blocks(model)
        watched: dict[str, tuple[nn.Module, LayerIO]] = {}
        indices: dict[str, int] = {}
        for layer in found:
            block = block_of.get(id(layer.module.weight))
            if block is not None:
                watched[layer.name] = (layer.module, layer.layer)
                indices[layer.name] = block
        capture = Capture(
            {
                name: (module, layer, pipeline.table.specs[indices[name]])
                for name, (module, layer) in watched.items()
            },
            max_rows=config.resolved_max_rows,
            seed=config.seed + pipeline.group.rank,
        )
        return cls(capture, indices, pipeline)

    def arm_if_due(self) -> None:
        """Watch the coming forwards if the coming step takes statistics."""
        self.capture.disarm()
        if self._pipeline.capture_due and self._indices:
            bases = {
                name: self._pipeline.basis(block).tensors for name, block in self._indices.items()
            }
            self.capture.arm(bases, self._add, self._pipeline.step_count)

    def _add(self, name: str, statistic: Tensors) -> None:
        self._pipeline.add(self._indices[name], statistic)

    def finish(self) -> None:
        """End the step's capture and count the step for what was delivered.

        Raises `CaptureError` in mode ``mc`` when a backward came without a sample."""
        if not self.capture.is_armed:
            return
        silent = self.capture.finish()
        for name, block in self._indices.items():
            if name not in silent:
                self._pipeline.add(block, {"steps": self._share})

    def disarm(self) -> None:
        """Watch nothing any more."""
        self.capture.disarm()
