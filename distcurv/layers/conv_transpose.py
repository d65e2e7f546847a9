"""Transposed convolutions: convolutions of zero-stuffed images, see `Spreading`.

Their weight is [C, Do / groups, K], so the gradient's matrix [Do, (C / groups) K] is a
rearranged copy.  Groups are as for `ConvIO`: they share side A.

Letters: N samples, C channels, L the axes of an image, K those of the kernel, P those of the
output (one to three each).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.errors import CaptureError
from distcurv.layers.conv import ConvIO
from distcurv.layers.layer import Rows, WeightSharing
from distcurv.layers.permuted_weight import PermutedWeight
from distcurv.layers.spreading import Spreading


class ConvTransposeIO(PermutedWeight, ConvIO):
    """`LayerIO` of `torch.nn.ConvTranspose1d`, `2d` and `3d`: the output pixels are the positions.

    A forward with ``output_size`` must mean the module's own ``output_padding``: which one it asks
    for cannot be seen from the input.  Another one is refused when the output's gradient
    arrives."""

    family = "ConvTranspose"

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        groups = cast(nn.ConvTranspose2d, module).groups
        if groups > 1 and isinstance(module._parameters.get(self.weight), DTensor):
            return f"its weight is sharded along the inputs, which its {groups} groups divide too"
        return super().refuse(module)

    def outputs(self, module: nn.Module) -> int:
        """See `PermutedWeight.outputs`."""
        groups = cast(nn.ConvTranspose2d, module).groups
        return module.get_parameter(self.weight).shape[1] * groups

    def outputs_first(self, module: nn.Module, weight: Tensor) -> Tensor:
        """See `PermutedWeight.outputs_first`: [groups, Do / groups, C / groups, K]."""
        groups = cast(nn.ConvTranspose2d, module).groups
        return weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2)

    def windows(self, module: nn.Module) -> Spreading:
        """See `ConvIO.windows`."""
        conv = cast(nn.ConvTranspose2d, module)
        return Spreading(
            conv.kernel_size,
            conv.stride,
            conv.dilation,
            cast("tuple[int, ...]", conv.padding),
            conv.output_padding,
        )

    def output_statistic(
        self,
        module: nn.Module,
        grad_output: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.output_statistic`.  Raises `CaptureError` for another output padding than
        the module's."""
        self._check_padding(module, grad_output)
        return super().output_statistic(
            module, grad_output, side, basis_dr, weight_sharing=weight_sharing
        )

    def output_rows(
        self,
        module: nn.Module,
        grad_output: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.output_rows`.  Raises `CaptureError` as `output_statistic` does."""
        self._check_padding(module, grad_output)
        return super().output_rows(module, grad_output, sampler, weight_sharing=weight_sharing)

    def _check_padding(self, module: nn.Module, grad_output: Tensor) -> None:
        windows = self.windows(module)
        axes = zip(grad_output.shape[2:], windows.smallest, windows.stride, strict=False)
        if any((size - smallest) % stride for size, smallest, stride in axes):
            raise CaptureError(
                f"a {self.family}{len(windows.kernel)}d layer with output_padding="
                f"{windows.output_padding} made an output of shape {tuple(grad_output.shape)}, "
                "which needs another one: it was called with output_size. Give the module that "
                "output_padding, or leave it out with ignore_modules"
            )
