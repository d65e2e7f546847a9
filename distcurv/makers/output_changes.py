"""How the outputs of layers, and the loss's gradients for them, change by the optimizer's step.

The first half is seen in the step itself, the second when the same batch runs once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.makers.grad_maker import GradientMaker
from distcurv.makers.pre_activations import Layer, LayerCalls, Outputs
from distcurv.makers.replay import Replay

PARTS = ("s", "y", "scales", "sizes")  # of a `Change`


class Change(NamedTuple):
    """Of one layer: sums over rows, so that those of ranks add up.

    Attributes:
        s: change of the outputs, [O].
        y: change of the gradients, [O].
        scales: (s, y) below which they are rounding: norms of sums of absolute values, [2].
        sizes: (rows, samples), [2]; zeros where the layer did not run both times alike.
    """

    s: Tensor
    y: Tensor
    scales: Tensor
    sizes: Tensor


class OutputChanges:
    """Of some layers.  Its state is what a step has left behind for after the optimizer."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._replay: Replay | None = None
        self._before: list[Outputs] = []
        self._loaded: dict[str, Change] = {}

    def begin(self, maker: GradientMaker) -> None:
        """Before the forward: what is set up now will be run again."""
        self._replay, self._before, self._loaded = Replay(maker), [], {}

    def end(self) -> None:
        """After the backward, which the layers' `LayerCalls` have seen."""
        self._before = [layer.output_sums() for layer in self._layers]

    def measure(self) -> dict[str, Change]:
        """By layer, from running the batch again with the parameters of now, on this rank alone;
        nothing where no step has begun and ended."""
        if self._replay is None or not self._before:
            return self._loaded
        with LayerCalls(self._layers) as watch:
            loss = self._replay.loss()
            if edges := watch.edges():
                torch.autograd.grad(loss, edges, allow_unused=True)
            after = [layer.output_sums() for layer in self._layers]
            watch.forget()
        return {
            layer.name: _change(old, new)
            for layer, old, new in zip(self._layers, self._before, after, strict=True)
        }

    def load(self, changes: Mapping[str, Change]) -> None:
        """What `measure` gave elsewhere, in place of measuring."""
        self.forget()
        self._loaded = dict(changes)

    def forget(self) -> None:
        """Nothing is left to be measured."""
        self._replay, self._before, self._loaded = None, [], {}


def _change(old: Outputs, new: Outputs) -> Change:
    zeros = torch.zeros_like(old.outputs.sum_O)
    if old.rows != new.rows:
        return Change(zeros, zeros, zeros.new_zeros(2), zeros.new_zeros(2))
    return Change(
        new.outputs.sum_O - old.outputs.sum_O,
        new.grads.sum_O - old.grads.sum_O,
        torch.stack([old.outputs.size_O.norm(), old.grads.size_O.norm()]),
        zeros.new_tensor([old.rows, old.samples]),
    )
