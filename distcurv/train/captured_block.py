"""A block as capture sees it: turns what hooks hand over into prefixed statistics.

It knows nothing of hooks, steps or sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcurv.curvature.precision import full_float32
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.layer import LayerIO, WeightSharing


class CapturedBlock:
    """Which module, how to read it, and how its two sides are encoded.

    Raises `ShapeError` when the BlockSpec does not have the dimensions of the module, with or
    without the bias coordinate; which of the two says whether the bias belongs to the block.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layer: LayerIO,
        spec: BlockSpec,
        weight_sharing: WeightSharing,
    ) -> None:
        self.name = name
        self.module = module
        self.layer = layer
        self.sides: dict[str, SideSpec] = dict(spec.named_sides())
        self.weight_sharing = weight_sharing
        dims = tuple(side.dim for side in spec.sides)
        choices = {layer.dims(module, bias): bias for bias in (False, layer.trains_bias(module))}
        if dims not in choices:
            raise ShapeError(
                f"block {name!r} has sides of dimensions {dims}, but its "
                f"{type(module).__name__} has {' or '.join(map(str, choices))}"
            )
        self.bias = choices[dims]

    def check_bases(self, bases: Tensors) -> None:
        """Raises `CaptureError` where a sketch has no basis, or one of another shape."""
        for prefix, side in self.sides.items():
            if side.encoding != "sketch":
                continue
            basis = bases.get(f"{prefix}.U")
            shape = None if basis is None else tuple(basis.shape)
            if shape != (side.dim, side.rank):
                raise CaptureError(
                    f"block {self.name!r} needs the basis {prefix}.U of shape "
                    f"({side.dim}, {side.rank}) to take a sketch; got {shape}"
                )

    def encode_input(self, input: Tensor, bases: Tensors) -> Tensors:
        """``A.*`` of one call."""
        with torch.no_grad(), full_float32(input.device):
            statistic = self.layer.input_statistic(
                self.module,
                input,
                self.sides["A"],
                bases.get("A.U"),
                bias=self.bias,
                weight_sharing=self.weight_sharing,
            )
        return {f"A.{key}": value for key, value in statistic.items()}

    def encode_output(
        self, grad_output: Tensor, bases: Tensors, squared_scale: float | Tensor
    ) -> Tensors:
        """``G.*`` of one call; the sums, not the count, are multiplied by ``squared_scale``."""
        with torch.no_grad(), full_float32(grad_output.device):
            statistic = self.layer.output_statistic(
                self.module,
                grad_output,
                self.sides["G"],
                bases.get("G.U"),
                weight_sharing=self.weight_sharing,
            )
            return {
                f"G.{key}": value if key == "count" else value * squared_scale
                for key, value in statistic.items()
            }
