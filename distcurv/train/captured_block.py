"""A block as capture sees it: turns what hooks hand over into prefixed statistics.

It knows nothing of hooks, steps or sinks.  A side is read in two parts: what must be taken amid
the user's forward or backward, and a `Reading` that makes the statistic of it.  Where all rows
count the first part does everything; where some are drawn it only copies them: between the layers
of a model the caches are cold, and an operation takes several times as long as among its likes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from distcurv.curvature.precision import full_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import weighted
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.affine_rows import encode_affine_rows
from distcurv.layers.layer import LayerIO, Rows, WeightSharing

Reading = Callable[[], Tensors]  # the prefixed statistic of one side of one call


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

    def read_input(self, input: Tensor, bases: Tensors, sampler: Sampler | None) -> Reading:
        """Side A of one call; with ``sampler`` only some rows are read now."""
        with torch.no_grad():
            if sampler is not None:
                rows = self.layer.input_rows(
                    self.module, input, sampler, weight_sharing=self.weight_sharing
                )
                return partial(self._encode, "A", rows, bases, 1.0)
            with full_float32(input.device):
                statistic = self.layer.input_statistic(
                    self.module,
                    input,
                    self.sides["A"],
                    bases.get("A.U"),
                    bias=self.bias,
                    weight_sharing=self.weight_sharing,
                )
        return partial(_prefixed, "A", statistic)

    def read_output(
        self,
        grad_output: Tensor,
        bases: Tensors,
        squared_scale: float | Tensor,
        sampler: Sampler | None,
    ) -> Reading:
        """Side G of one call; the sums, not the count, are multiplied by ``squared_scale``."""
        with torch.no_grad():
            if sampler is not None:
                rows = self.layer.output_rows(
                    self.module, grad_output, sampler, weight_sharing=self.weight_sharing
                )
                return partial(self._encode, "G", rows, bases, squared_scale)
            with full_float32(grad_output.device):
                statistic = self.layer.output_statistic(
                    self.module,
                    grad_output,
                    self.sides["G"],
                    bases.get("G.U"),
                    weight_sharing=self.weight_sharing,
                )
            count = statistic.pop("count")
            statistic = {**weighted(statistic, squared_scale), "count": count}
        return partial(_prefixed, "G", statistic)

    def _encode(
        self, prefix: str, rows: Rows, bases: Tensors, squared_scale: float | Tensor
    ) -> Tensors:
        with torch.no_grad(), full_float32(rows.rows_nd.device):
            statistic = encode_affine_rows(
                self.sides[prefix],
                rows.rows_nd,
                bases.get(f"{prefix}.U"),
                self.bias and prefix == "A",
                squared_scale * rows.weight,
            )
            some = next(iter(statistic.values()))
            statistic["count"] = some.new_full((), rows.count)
        return _prefixed(prefix, statistic)


def _prefixed(prefix: str, statistic: Tensors) -> Tensors:
    return {f"{prefix}.{key}": value for key, value in statistic.items()}
