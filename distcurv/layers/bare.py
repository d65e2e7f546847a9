"""A parameter of which nothing is known but its gradient: one diagonal block.

Letters: P numbers of the parameter.
"""

from __future__ import annotations

from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import LayerIO
from distcurv.layers.local_part import own_part


class BareIO:
    """`JointIO` of one parameter, but for the statistic: no call shows its per-sample gradients.

    Args:
        weight: the name of the module's parameter.
    """

    one_sided: str = "diagonal"
    diagonal_sides: frozenset[str] = frozenset()
    weight_is_matrix = False
    rows: tuple[int, int] | None = None
    call_kind = ""

    def __init__(self, weight: str) -> None:
        self.weight = weight

    def parameter_names(self, module: nn.Module) -> list[str]:
        """See `LayerIO.parameter_names`."""
        return [self.weight]

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        return None

    def trains_bias(self, module: nn.Module) -> bool:
        """Never: a bias is a parameter like any other here."""
        return False

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """(P,)"""
        return (module.get_parameter(self.weight).numel(),)

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """The ``.grad`` as [P, 1]; a view where it is contiguous."""
        grad = module.get_parameter(self.weight).grad
        return None if grad is None else AffineGradient(own_part(grad).reshape(-1, 1), None)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """Overwrite the ``.grad`` in place."""
        target = module.get_parameter(self.weight).grad
        if target is None:
            raise CaptureError(
                f"write_gradient: the parameter {self.weight!r} has no gradient to overwrite; call "
                "it between backward() and zero_grad()"
            )
        target = own_part(target)
        if grad.weight_OD.numel() != target.numel():
            raise ShapeError(
                f"write_gradient got {grad.weight_OD.numel()} numbers for the parameter "
                f"{self.weight!r}, which has {target.numel()}"
            )
        if target.data_ptr() != grad.weight_OD.data_ptr():
            target.copy_(_like(grad.weight_OD, target))


def _like(flat_P1: Tensor, target: Tensor) -> Tensor:
    return flat_P1.reshape(target.shape)


AnyLayer = LayerIO | JointIO | BareIO
