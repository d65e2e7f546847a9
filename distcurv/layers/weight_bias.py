"""What Linear and the convolutions share: a weight [Do, ...], a bias [Do] or none.

Letters: N rows, d a side's dimension, r its rank, I = Di (+1 with the bias coordinate), O = Do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows
from distcurv.errors import CaptureError, ShapeError


class WeightBias:
    """The parts of `LayerIO` that only look at ``weight`` (first dimension O) and ``bias``."""

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed from other parameters (weight_norm or alike)"
        if not weight.requires_grad:
            return "its weight is frozen"
        return None

    def trains_bias(self, module: nn.Module) -> bool:
        """See `LayerIO.trains_bias`."""
        bias = module._parameters.get("bias")
        return bias is not None and bias.requires_grad

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """See `LayerIO.dims`."""
        weight = module.get_parameter("weight")
        outputs = weight.shape[0]
        return weight.numel() // outputs + int(bias), outputs

    def gradient(self, module: nn.Module, bias: bool) -> Tensor | None:
        """See `LayerIO.gradient`."""
        grads = _grads(module, bias)
        if grads is None:
            return None
        weight_grad, bias_grad = grads
        weight_OI = weight_grad.flatten(1)
        if bias_grad is None:
            return weight_OI.clone()
        return torch.cat([weight_OI, bias_grad.unsqueeze(1)], dim=1)

    def write_gradient(self, module: nn.Module, bias: bool, matrix_OI: Tensor) -> None:
        """See `LayerIO.write_gradient`."""
        inputs, outputs = self.dims(module, bias)
        if matrix_OI.shape != (outputs, inputs):
            raise ShapeError(
                f"write_gradient got a matrix {tuple(matrix_OI.shape)} for a "
                f"{type(module).__name__}: it must be ({outputs}, {inputs})"
            )
        grads = _grads(module, bias)
        if grads is None:
            raise CaptureError(
                f"write_gradient: this {type(module).__name__} has no gradient to overwrite; "
                "call it between backward() and zero_grad()"
            )
        weight_grad, bias_grad = grads
        if bias_grad is None:
            weight_grad.copy_(matrix_OI.view_as(weight_grad))
            return
        weight_grad.copy_(matrix_OI[:, :-1].reshape(weight_grad.shape))
        bias_grad.copy_(matrix_OI[:, -1])


def _grads(module: nn.Module, bias: bool) -> tuple[Tensor, Tensor | None] | None:
    weight_grad = module.get_parameter("weight").grad
    if weight_grad is None:
        return None
    if not bias:
        return weight_grad, None
    bias_grad = module.get_parameter("bias").grad
    if bias_grad is None:
        raise CaptureError(
            f"this {type(module).__name__} has a weight gradient but no bias gradient, although "
            "its block counts the bias: was the bias frozen after the preconditioner was made? "
            "Make it anew after freezing"
        )
    return weight_grad, bias_grad


def require_basis(side: SideSpec, basis_dr: Tensor | None, like: Tensor) -> Tensor:
    """The basis in the dtype and on the device of the captured tensor, checked."""
    if basis_dr is None:
        raise CaptureError(
            f"a sketch of a side of dimension {side.dim} needs the installed basis; got none"
        )
    if basis_dr.shape != (side.dim, side.rank):
        raise ShapeError(
            f"the basis is {tuple(basis_dr.shape)}: the side needs ({side.dim}, {side.rank})"
        )
    return basis_dr.to(device=like.device, dtype=like.dtype)


def encode_affine_rows(
    side: SideSpec, rows_Nd: Tensor, basis_dr: Tensor | None, bias: bool
) -> Tensors:
    """`encode_rows` of [rows, 1] where ``bias`` is set, without that copy for a sketch.

    Args:
        side: the side; ``side.dim`` counts the bias coordinate.
        rows_Nd: [N, side.dim - bias].
        basis_dr: [side.dim, r] for a sketch.
        bias: append a coordinate that is always 1.
    """
    if side.encoding == "sketch":
        basis_dr = require_basis(side, basis_dr, rows_Nd)
    if not bias:
        return encode_rows(side, rows_Nd, basis_dr)
    if basis_dr is None or side.encoding == "dense":
        ones_N1 = rows_Nd.new_ones(rows_Nd.shape[0], 1)
        return encode_rows(side, torch.cat([rows_Nd, ones_N1], dim=1), None)
    projected_Nr = torch.addmm(basis_dr[-1], rows_Nd, basis_dr[:-1])
    y_weight_dr = rows_Nd.T @ projected_Nr
    diag_d = rows_Nd.square().sum(0)
    return affine_sketch(side, y_weight_dr, projected_Nr.sum(0), diag_d, rows_Nd.shape[0])


def affine_sketch(
    side: SideSpec, y_weight_dr: Tensor, y_bias_r: Tensor | None, diag_d: Tensor, rows: int
) -> Tensors:
    """A sketch from its parts: the weight coordinates and, unless ``y_bias_r`` is None, the bias
    coordinate, whose own sum of squares is the number of rows."""
    trace = diag_d.sum()
    if y_bias_r is not None:
        y_weight_dr = torch.cat([y_weight_dr, y_bias_r.unsqueeze(0)])
        diag_d = torch.cat([diag_d, diag_d.new_full((1,), rows)])
        trace = trace + rows
    sketch = {"Y": y_weight_dr, "trace": trace}
    if side.tail == "diagonal":
        sketch["diag"] = diag_d
    return sketch
