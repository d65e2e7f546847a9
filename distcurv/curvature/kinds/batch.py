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


def block_by_block(
    refresh: Callable[[Tensors, Tensors, Tensors], Refreshed],
    state: Tensors,
    statistic: Tensors,
    basis: Tensors,
) -> Refreshed:
    """``refresh`` of the batch; on the CPU one block after the other.

    Rounding in LAPACK and BLAS depends on where a matrix begins in memory, and so on its place in
    a batch. On the CPU, where batches save only call overhead, every block is therefore refreshed
    alone from fresh copies: it gets the same bits whatever blocks share its refresh, and a run can
    be replayed. On other devices the whole batch goes in one call.
    """
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
    return {
        name: tensor[i : i + 1].clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


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
    kept: Tensors = {}
    for name, tensor in new.items():
        some = (steps_B > 0).view(-1, *[1] * (tensor.dim() - 1))
        kept[name] = torch.where(some, tensor, old[name])
    return kept


def check_finite(tensors: Tensors, kind: str) -> None:
    """Raise `NumericsError` when a refresh made a number that is not finite."""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    if not bool(finite.all()):  # one wait for the device, not one per tensor
        bad = [name for name, good in zip(tensors, finite.tolist(), strict=True) if not good]
        raise NumericsError(
            f"a refresh of kind {kind!r} made {', '.join(bad)} with NaN or infinite entries: keep "
            f"the previous version and count the failure"
        )
