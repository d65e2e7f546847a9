"""What K-BFGS sees of layers: sums over samples and positions of inputs, outputs and gradients.

`LayerCalls` watches forwards and the gradients of their outputs while it is entered, through one
global hook and hooks on the graph that the forward makes: nothing stays behind on the modules.

Letters: N samples (dimension 0 of the layer's input), S positions (tokens, pixels), n = N S rows,
I inputs (with the bias coordinate), O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
)

from distcurv.curvature.precision import full_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec
from distcurv.curvature.triangle import unpack_triangle
from distcurv.errors import CaptureError
from distcurv.layers.layer import LayerIO
from distcurv.train.discover import FoundLayer
from distcurv.train.eager import hold_eager

_ALL = Sampler(max_rows=1 << 62, number=0)


class Sums(NamedTuple):
    """Over rows, of a tensor and of its absolute values, which says how exact the first one is;
    both [O]."""

    sum_O: Tensor
    size_O: Tensor


class Outputs(NamedTuple):
    """Of all calls of a layer: its outputs, the gradients of the loss for them, n and N."""

    outputs: Sums
    grads: Sums
    rows: int
    samples: int


@dataclass
class _Call:
    input: Tensor
    outputs: Sums
    rows: int
    edge: GradientEdge | None
    grads: Sums | None = None


@dataclass
class Layer:
    """A layer that is watched, see `FoundLayer`."""

    name: str
    module: nn.Module
    io: LayerIO
    bias: bool
    inputs: int
    outputs: int
    calls: list[_Call] = field(default_factory=list)

    @classmethod
    def of(cls, found: FoundLayer) -> Layer:
        """Of one with two sides."""
        io = cast(LayerIO, found.layer)
        bias = io.trains_bias(found.module)
        inputs, outputs = io.dims(found.module, bias)
        return cls(found.name, found.module, io, bias, inputs, outputs)

    def reached(self) -> list[_Call]:
        """The calls whose outputs got a gradient: no recomputation of a checkpoint, no forward
        without a backward."""
        return [call for call in self.calls if call.grads is not None]

    def output_sums(self) -> Outputs:
        """Zeros where the layer had no part in the loss."""
        calls = self.reached()
        return Outputs(
            self._total([call.outputs for call in calls]),
            self._total([call.grads for call in calls if call.grads is not None]),
            sum(call.rows for call in calls),
            # A layer that runs several times shows more rows of the same samples.
            max((len(call.input) for call in calls), default=0),
        )

    def input_sum(self) -> tuple[Tensor, Tensor]:
        """The mean input over positions, [.., 1] with a bias, summed over samples, [I]; and how
        many they were, ()."""
        total, count = self.zeros(self.inputs), 0
        for call in self.reached():
            rows = self.io.input_rows(self.module, call.input, _ALL, weight_sharing="reduce")
            own = rows.rows_nd.sum(0)
            if self.bias:
                own = torch.cat([own, own.new_full((1,), len(rows.rows_nd))])
            total, count = total + own, count + len(rows.rows_nd)
        return total, total.new_tensor(count)

    def input_products(self) -> tuple[Tensor, Tensor]:
        """The sum over rows of a aᵀ, [I, I], and n, ()."""
        side = SideSpec(self.inputs, self.inputs, encoding="dense")
        total, count = self.zeros(self.inputs, self.inputs), self.zeros()
        for call in self.reached():
            made = self._input_statistic(call, side, None)
            total = total + unpack_triangle(made["packed"], self.inputs)
            count = count + made["count"]
        return total, count

    def input_action(self, s_I: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over rows of a (aᵀ s), [I], and n, ()."""
        side = SideSpec(self.inputs, 1, encoding="sketch")
        total, count = self.zeros(self.inputs), self.zeros()
        for call in self.reached():
            made = self._input_statistic(call, side, s_I.unsqueeze(1))
            total, count = total + made["Y"].squeeze(1), count + made["count"]
        return total, count

    def zeros(self, *shape: int) -> Tensor:
        """On the layer's device, in what its statistics are in."""
        weight = self.module.get_parameter(self.io.weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def _total(self, parts: Sequence[Sums]) -> Sums:
        zero = self.zeros(self.outputs)
        return Sums(sum((p.sum_O for p in parts), zero), sum((p.size_O for p in parts), zero))

    def _input_statistic(
        self, call: _Call, side: SideSpec, basis: Tensor | None
    ) -> Mapping[str, Tensor]:
        return self.io.input_statistic(
            self.module, call.input, side, basis, bias=self.bias, weight_sharing="expand"
        )


class LayerCalls:
    """Watches some layers while entered; what was seen before is forgotten.

    Outputs are summed at the forward: an operation in place may overwrite them.  Inputs are kept
    as they are: the backward needs them unchanged as well.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._by_id = {id(layer.module): layer for layer in layers}

    def __enter__(self) -> LayerCalls:
        self.forget()
        self._release = hold_eager()
        self._handle = register_module_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer in self.layers:
            for call in layer.calls:
                call.edge = None  # it holds the graph, whose hook holds the call
        self._handle.remove()
        # What torch's handle forgets: an entry for each hook that takes keyword arguments.
        _global_forward_hooks_with_kwargs.pop(self._handle.id, None)
        self._release()

    def forget(self) -> None:
        """Let go of what was seen."""
        for layer in self.layers:
            layer.calls.clear()

    def edges(self) -> list[GradientEdge]:
        """Where the gradients of the outputs arrive."""
        calls = [call for layer in self.layers for call in layer.calls]
        return [call.edge for call in calls if call.edge is not None]

    def _see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        layer = self._by_id.get(id(module))
        if layer is None or not torch.is_grad_enabled():
            return
        input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if input is None or not isinstance(output, Tensor):
            raise CaptureError(
                f"layer {layer.name!r}: its {type(module).__name__} was not called with a tensor "
                "that gives a tensor; leave it out with ignore_modules"
            )
        if not output.requires_grad or input.numel() == 0:
            return
        rows = output.numel() // layer.outputs
        call = _Call(input.detach(), _sums(layer, output), rows, get_gradient_edge(output))
        layer.calls.append(call)
        output.register_hook(partial(_arrived, layer, call))


def _arrived(layer: Layer, call: _Call, grad: Tensor) -> None:
    call.grads = _sums(layer, grad)


def _sums(layer: Layer, tensor: Tensor) -> Sums:
    """Over samples and positions."""
    with torch.no_grad(), full_float32(tensor.device):
        both = [
            layer.io.output_rows(layer.module, part, _ALL, weight_sharing="reduce").rows_nd.sum(0)
            for part in (tensor, tensor.abs())
        ]
    return Sums(*both)
