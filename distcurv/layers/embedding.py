"""nn.Embedding: a Linear layer on unit vectors, whose input side is diagonal by nature.

With e_v the unit vector of id v, the gradient matrix is the sum over samples and positions of
g eᵀ, [D, V]: the transpose of the weight's.  Side A = Σ e eᵀ is the diagonal matrix of how often
each id occurs, count N S; side G = Σ g gᵀ, count N.  The padding id has no part in either: its row
gets no gradient.

``expand`` and ``reduce`` are the same here: a mean of unit vectors over positions would make side
A a full matrix [V, V].

Letters: N samples, S positions, n rows looked at, V ids, D features.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from distcurv.curvature.apply import AffineGradient
from distcurv.curvature.precision import at_least_float32
from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import SideSpec, Tensors
from distcurv.errors import CaptureError, ShapeError
from distcurv.layers.affine_rows import drawn_rows, encode_affine_rows
from distcurv.layers.embedding_head import id_counts
from distcurv.layers.layer import Rows, WeightSharing
from distcurv.layers.weight_bias import WeightBias


class EmbeddingIO(WeightBias):
    """`LayerIO` of `torch.nn.Embedding`: inputs are ids [N, ...] of an integer dtype.

    The encoding of side A is ``diagonal``.  The caller sets the output gradients at positions that
    `counted_positions` excludes to zero."""

    diagonal_sides: frozenset[str] = frozenset({"A"})
    weight_is_matrix = False

    def __init__(self, weight: str = "weight") -> None:
        super().__init__(weight, bias=None)

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        embedding = cast(nn.Embedding, module)
        if embedding.max_norm is not None:
            return f"max_norm={embedding.max_norm} changes the weight in the forward"
        if embedding.sparse:
            return "sparse=True makes sparse gradients, which cannot be preconditioned"
        if embedding.scale_grad_by_freq:
            return "scale_grad_by_freq=True makes gradients that are not those of the loss"
        return super().refuse(module)

    def dims(self, module: nn.Module, bias: bool) -> tuple[int, ...]:
        """See `LayerIO.dims`: (V, D)."""
        ids, features = module.get_parameter(self.weight).shape
        return ids, features

    def counted_positions(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """Which positions have a part in the gradient: bool, of the input's shape; None for all.
        Those of the padding id do not, whatever the gradient of their output is."""
        padding = cast(nn.Embedding, module).padding_idx
        return None if padding is None else input != padding

    def input_statistic(
        self,
        module: nn.Module,
        input: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        bias: bool,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.input_statistic`: ``diag`` [V] and ``count``, of all ids."""
        ids = input.detach()
        if ids.dim() < 1:
            raise CaptureError(
                "an Embedding layer got one id without a batch dimension: give it [N, ...]"
            )
        counts_V = id_counts(ids, side.dim, cast(nn.Embedding, module).padding_idx)
        return {"diag": counts_V, "count": counts_V.new_full((), ids.numel())}

    def output_statistic(
        self,
        module: nn.Module,
        grad_output: Tensor,
        side: SideSpec,
        basis_dr: Tensor | None,
        *,
        weight_sharing: WeightSharing,
    ) -> Tensors:
        """See `LayerIO.output_statistic`."""
        g_NSd = at_least_float32(_positions(grad_output))
        statistic = encode_affine_rows(side, g_NSd.flatten(0, 1), basis_dr, bias=False)
        statistic["count"] = g_NSd.new_full((), g_NSd.shape[0])
        return statistic

    def input_rows(
        self,
        module: nn.Module,
        input: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """Raises `CaptureError`: counting all ids costs no more than drawing some."""
        raise CaptureError(
            "side A of an Embedding is a diagonal, which has no rows: call input_statistic"
        )

    def output_rows(
        self,
        module: nn.Module,
        grad_output: Tensor,
        sampler: Sampler,
        *,
        weight_sharing: WeightSharing,
    ) -> Rows:
        """See `LayerIO.output_rows`."""
        return drawn_rows(_positions(grad_output), sampler, "expand", "G")

    def gradient(self, module: nn.Module, bias: bool) -> AffineGradient | None:
        """See `LayerIO.gradient`: [D, V], a view of the weight's [V, D]."""
        grads = self._grads(module, False)
        return None if grads is None else AffineGradient(grads[0].mT, None)

    def write_gradient(self, module: nn.Module, bias: bool, grad: AffineGradient) -> None:
        """See `LayerIO.write_gradient`."""
        grads = self._grads(module, False)
        if grads is None:
            raise CaptureError(
                "write_gradient: this Embedding has no gradient to overwrite; call it between "
                "backward() and zero_grad()"
            )
        target_DV, source_DV = grads[0].mT, grad.weight_OD
        if source_DV.shape != target_DV.shape or grad.bias_O is not None:
            raise ShapeError(
                f"write_gradient got a gradient {tuple(source_DV.shape)} and "
                f"{'no' if grad.bias_O is None else 'a'} bias for an Embedding: it must be "
                f"{tuple(target_DV.shape)}, without a bias"
            )
        same = target_DV.data_ptr() == source_DV.data_ptr()
        if not (same and target_DV.stride() == source_DV.stride()):
            target_DV.copy_(source_DV)


def _positions(grad_output: Tensor) -> Tensor:
    """[N, S, D] from [N, ..., D]."""
    if grad_output.dim() < 2:
        raise CaptureError(
            f"an Embedding layer got an output gradient of shape {tuple(grad_output.shape)}: "
            "without a batch dimension samples cannot be counted; give it ids [N, ...]"
        )
    return grad_output.detach().reshape(grad_output.shape[0], -1, grad_output.shape[-1])
