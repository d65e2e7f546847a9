"""What every kind does with a batch of blocks: a block's result is its own, nothing new means no
change, and no NaN leaves.

Letters: B blocks of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distcurv.curvature.kinds.kind import Refreshed
from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.errors import NumericsError

_ALIGNMENT = 64  # bytes: how PyTorch aligns new tensors on the CPU


def block_by_block(
    refresh: Callable[[Tensors, Tensors, Tensors], Refreshed],
    state: Tensors,
    statistic: Tensors,
    basis: Tensors,
) -> Refreshed:
    """``refresh`` of the batch; on the CPU one block after the other.

    Rounding in LAPACK and BLAS depends on where a matrix begins in memory, and so on its place in
    a batch. On the CPU, where batches save only call overhead, every block is therefore refreshed
    alone, from memory aligned as that of a fresh copy: it gets the same bits whatever blocks share
    its refresh, and a run can be replayed. On other devices the whole batch goes in one call.
    """
    # Without the bookkeeping that autograd does even under no_grad: a tenth of the time of a small
    # refresh. It also makes PyTorch refuse to change the results in place.
    with torch.inference_mode():
        if statistic["steps"].device.type != "cpu":
            return refresh(state, statistic, basis)
        parts = [
            refresh(_one(state, i), _one(statistic, i), _one(basis, i))
            for i in range(len(statistic["steps"]))
        ]
        if len(parts) == 1:
            return parts[0]
        states, published, uncaptured, innovation = zip(*parts, strict=True)
        return Refreshed(
            _joined(states), _joined(published), torch.cat(uncaptured), torch.cat(innovation)
        )


def _one(tensors: Tensors, i: int) -> Tensors:
    return {name: _alone(tensor[i : i + 1]) for name, tensor in tensors.items()}


def _alone(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor  # as good as a copy
    return tensor.clone(memory_format=torch.contiguous_format)


def _joined(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def counted_steps(spec: BlockSpec, statistic: Tensors) -> Tensor:
    """The steps [B] that a statistic stands for, 0 where any side's count is 0."""
    steps_B = statistic["steps"]
    for name, _ in spec.named_sides():
        steps_B = torch.where(statistic[f"{name}.count"] > 0, steps_B, torch.zeros_like(steps_B))
    return steps_B


def keep_where_empty(steps_B: Tensor, new: Tensors, old: Tensors) -> Tensors:
    """``new`` where there were steps, else ``old`` bit for bit; [B, ...] by name."""
    some_B = steps_B > 0
    if some_B.device.type == "cpu" and bool(some_B.all()):  # elsewhere reading it means waiting
        return new
    return {
        name: torch.where(some_B.view(-1, *[1] * (tensor.dim() - 1)), tensor, old[name])
        for name, tensor in new.items()
    }


def check_finite(tensors: Tensors, kind: str) -> None:
    """Raise `NumericsError` when a refresh made a number that is not finite."""
    everything = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    # 0 · x is 0 or NaN: a third of the time of isfinite, and one wait for the device.
    if not bool(everything.mul_(0.0).sum() == 0.0):
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        raise NumericsError(
            f"a refresh of kind {kind!r} made {', '.join(bad)} with NaN or infinite entries: keep "
            f"the previous version and count the failure"
        )
