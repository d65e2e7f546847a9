"""Normalisations with a trained weight: y = w ∘ x̂ + b, kind unitwise.

With x̂ the normalised input, the per-sample gradients of unit i are w_ni = Σ_s g_nsi x̂_nsi and
b_ni = Σ_s g_nsi.  Their 2 × 2 second moments are the block ("unit-wise" in Osawa et al. 2020,
"Scalable and Practical Natural Gradient for Large-Scale Deep Learning").  Under a normalisation
over the batch x̂_n depends on the other samples too; it is what the forward made of it.

Letters: N samples, n of them looked at, S (index s) positions, U (index i) units, C channels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.layers.joint import Kept, UnitWeights, draw_samples, drawn_gradient, keep_input
from distcurv.layers.unit_positions import (
    Positions,
    channels,
    channels_of_images,
    count_positions,
    sum_positions,
    trailing,
)

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


class NormIO(UnitWeights):
    """`JointIO` of a normalisation of each sample by itself; subclasses say how.

    Args:
        positions: where the output has its positions.
        weight, bias: names in the module.
    """

    one_sided: str = "unitwise"

    def __init__(
        self, positions: Positions, weight: str = "weight", bias: str | None = "bias"
    ) -> None:
        super().__init__(weight, bias)
        self._positions = positions

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """See `JointIO.keep`."""
        return keep_input(input, self._count_positions(module, input), sampler)

    def statistic(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensors:
        """See `JointIO.statistic`."""
        w_nU, *rest = self.sample_gradients(module, kept, grad_output, bias=bias).unbind(-1)
        statistic = {"ww": w_nU.square().sum(0)}
        if rest:
            (b_nU,) = rest
            statistic |= {"wb": (w_nU * b_nU).sum(0), "bb": b_nU.square().sum(0)}
        else:
            zeros_U = torch.zeros_like(statistic["ww"])
            statistic |= {"wb": zeros_U, "bb": zeros_U.clone()}
        statistic["count"] = w_nU.new_full((), kept.count)
        return statistic

    def sample_gradients(
        self, module: nn.Module, kept: Kept, grad_output: Tensor, *, bias: bool
    ) -> Tensor:
        """See `ShowsSamples.sample_gradients`."""
        g = drawn_gradient(kept, grad_output)
        positions = self._positions(module, g)
        w_nU = sum_positions(g * self._normalised(module, kept), positions)
        return torch.stack([w_nU, sum_positions(g, positions)] if bias else [w_nU], -1)

    def _count_positions(self, module: nn.Module, input: Tensor) -> int:
        return count_positions(input, self._positions(module, input))

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        """x̂ of the samples looked at."""
        raise NotImplementedError


class LayerNormIO(NormIO):
    """Of `torch.nn.LayerNorm`."""

    def __init__(self) -> None:
        super().__init__(trailing)

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        norm = cast(nn.LayerNorm, module)
        return F.layer_norm(kept.input(), list(norm.normalized_shape), None, None, norm.eps)


class ImageLayerNormIO(NormIO):
    """Of layer normalisations of the channels of images, whose ``data_format`` says where those
    are: ``channels_first`` ([N, C, H, W]) or last."""

    def __init__(self) -> None:
        super().__init__(_by_format)

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        norm, x = cast(nn.LayerNorm, module), kept.input()
        at = _channels_at(module)
        shape = list(norm.normalized_shape)
        return F.layer_norm(x.movedim(at, -1), shape, None, None, norm.eps).movedim(-1, at)


class RMSNormIO(NormIO):
    """Of `torch.nn.RMSNorm`, and of others that divide by the root mean square of the last
    dimension.

    Args:
        eps: the name of the module's attribute.
    """

    def __init__(self, eps: str = "eps") -> None:
        super().__init__(trailing, bias=None)
        self._eps = eps

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        x = kept.input()
        shape = list(getattr(module, "normalized_shape", x.shape[-1:]))
        return F.rms_norm(x, shape, None, getattr(module, self._eps))


class GroupNormIO(NormIO):
    """Of `torch.nn.GroupNorm`."""

    def __init__(self) -> None:
        super().__init__(channels)

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        norm = cast(nn.GroupNorm, module)
        return F.group_norm(kept.input(), norm.num_groups, None, None, norm.eps)


class InstanceNormIO(NormIO):
    """Of `torch.nn.InstanceNorm1d`, ``2d`` and ``3d``, with or without running statistics.

    Args:
        spatial: 1, 2 or 3.
    """

    def __init__(self, spatial: int) -> None:
        super().__init__(channels_of_images(spatial))

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """See `JointIO.keep`."""
        norm, kept = cast(InstanceNorm, module), super().keep(module, input, sampler)
        if not norm.training and norm.track_running_stats:
            _keep_running(norm, kept)
        return kept

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        eps = cast(InstanceNorm, module).eps
        if "mean" in kept.tensors:
            return _by_running(kept, eps)
        return F.instance_norm(kept.input(), eps=eps)


class BatchNormIO(NormIO):
    """Of `torch.nn.BatchNorm1d`, ``2d`` and ``3d``: x̂ is made with the statistics of the batch of
    this very call in training, with the running ones (of the time of the call) in evaluation."""

    def __init__(self) -> None:
        super().__init__(channels)

    def keep(self, module: nn.Module, input: Tensor, sampler: Sampler | None) -> Kept:
        """See `JointIO.keep`.  With a sampler, training looks at the whole batch once more, in the
        input's dtype: the drawn samples alone do not know its statistics."""
        norm = cast(BatchNorm, module)
        by_batch = norm.training or norm.running_mean is None
        if by_batch and sampler is not None:
            draw = draw_samples(len(input), self._count_positions(module, input), sampler)
            normalised = _drawn_by_batch(input.detach(), draw.slice, norm.eps)
            return Kept({"normalised": normalised}, draw, len(input))
        kept = super().keep(module, input, sampler)
        if not by_batch:
            _keep_running(norm, kept)
        return kept

    def _normalised(self, module: nn.Module, kept: Kept) -> Tensor:
        if "normalised" in kept.tensors:
            return kept.tensors["normalised"]
        eps = cast(BatchNorm, module).eps
        return _by_running(kept, eps) if "mean" in kept.tensors else _by_batch(kept.input(), eps)


class SyncBatchNormIO(BatchNormIO):
    """Of `torch.nn.SyncBatchNorm`, which is refused."""

    def refuse(self, module: nn.Module) -> str | None:
        """See `LayerIO.refuse`."""
        return (
            "its batch statistics are those of all ranks, which capture does not know: use "
            "BatchNorm, or leave it to the base optimizer"
        )


def _channels_at(module: object) -> int:
    return 1 if getattr(module, "data_format") == "channels_first" else -1  # noqa: B009


def _by_format(module: object, tensor: Tensor) -> range:
    return (channels if _channels_at(module) == 1 else trailing)(module, tensor)


def _keep_running(norm: BatchNorm | InstanceNorm, kept: Kept) -> None:
    """Add copies: the next call in training changes the statistics in place."""
    assert norm.running_mean is not None and norm.running_var is not None
    kept.tensors["mean"], kept.tensors["var"] = norm.running_mean.clone(), norm.running_var.clone()


def _by_running(kept: Kept, eps: float) -> Tensor:
    x = kept.input()
    mean_C, var_C = (kept.tensors[name].to(x.dtype) for name in ("mean", "var"))
    return F.batch_norm(x, mean_C, var_C, eps=eps)


def _drawn_by_batch(x: Tensor, drawn: slice, eps: float) -> Tensor:
    """x̂ of some samples, by the statistics of all, in memory of its own."""
    if x.device.type != "cpu" or x.dtype.itemsize < 4 or x.dim() == 2 or not x.is_contiguous():
        return _by_batch(x, eps)[drawn].clone()
    # Three times as fast as torch's own pass over this layout, and centred before it is squared.
    mean_C = x.flatten(2).mean(-1).mean(0)
    centred = x.flatten(2) - mean_C.unsqueeze(-1)
    var_C = torch.linalg.vector_norm(centred, dim=-1).square_().mean(0) / centred.shape[-1]
    return F.batch_norm(x[drawn], mean_C, var_C, eps=eps)


def _by_batch(x: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, training=True, eps=eps)
