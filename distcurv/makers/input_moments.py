"""First and second moments of the inputs of layers at one step, over all ranks, for K-BFGS.

Letters: I inputs (with the bias coordinate), N samples, S positions of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distcurv.makers.pre_activations import Layer

Average = Callable[[Sequence[Tensor]], None]


class InputMean(NamedTuple):
    """Of one layer: ā [I], S, N (per rank), and whether the layer ran; all on the device."""

    mean_I: Tensor
    positions: Tensor
    samples: Tensor
    ran: Tensor


class InputMoments:
    """Of what the layers' `LayerCalls` has seen.

    Args:
        average: averages tensors in place over the ranks.
        data_size: samples per rank by which second moments are divided; None: those seen.
    """

    def __init__(self, layers: Sequence[Layer], average: Average, data_size: int | None) -> None:
        self._layers = layers
        self._average = average
        self._data_size = data_size
        self._means: dict[str, InputMean] = {}

    def forget(self) -> None:
        """The step has ended."""
        self._means = {}

    def means(self) -> dict[str, InputMean]:
        """By layer; made once a step."""
        if not self._means:
            sums, sizes = [], []
            for layer in self._layers:
                total, count = layer.input_sum()
                out = layer.output_sums()
                sums.append(total)
                sizes.append(torch.stack([count, *count.new_tensor([out.rows, out.samples])]))
            self._average(sums + sizes)
            for layer, total, (count, rows, samples) in zip(self._layers, sums, sizes, strict=True):
                self._means[layer.name] = InputMean(
                    total / at_least_1(count), rows / at_least_1(samples), samples, count > 0
                )
        return self._means

    def matrices(self) -> dict[str, Tensor]:
        """A = sum over positions of a aᵀ per sample, [I, I], by layer."""
        return self._per_sample({layer.name: layer.input_products() for layer in self._layers})

    def actions(self, steps_I: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A s, [I], for some layers, without forming A."""
        layers = {layer.name: layer for layer in self._layers}
        return self._per_sample({name: layers[name].input_action(s) for name, s in steps_I.items()})

    def _per_sample(self, made: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """From sums over rows, and how many these were."""
        self._average([tensor for pair in made.values() for tensor in pair])
        scaled = {}
        for name, (total, count) in made.items():
            own = self.means()[name]
            share = 1.0 if self._data_size is None else own.samples / self._data_size
            scaled[name] = total * (own.positions * share / at_least_1(count))
        return scaled


def at_least_1(count: Tensor) -> Tensor:
    """For a division: what is nothing, and was counted zero times, stays nothing."""
    return count.clamp(min=1)
