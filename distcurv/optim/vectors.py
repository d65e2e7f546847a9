"""What is no matrix gets AdamW's rule, by PyTorch's own implementation of it.

Of a sharded parameter this rank updates its own part; so the state has the shape of that part.
"""

from __future__ import annotations

from collections.abc import Container, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distcurv.layers.local_part import own_part


def update_vectors(
    group: dict[str, Any], state: MutableMapping[Tensor, Any], matrices: Container[int]
) -> None:
    """AdamW's rule for a group's parameters that are no matrices.

    Args:
        group: a param group with lr, betas, eps and weight_decay.
        state: the optimizer's state by parameter.
        matrices: ids of the parameters that are matrices.
    """
    params = _vectors(group, matrices)
    _adamw(group, state, params, [own_part(p) for p in params])


def write_vector_directions(
    group: dict[str, Any], state: MutableMapping[Tensor, Any], matrices: Container[int]
) -> None:
    """Adam's directions, before the learning rate, in ``.grad``; arguments as `update_vectors`."""
    params = _vectors(group, matrices)
    moved = [torch.zeros_like(own_part(p)) for p in params]
    _adamw({**group, "lr": 1.0, "weight_decay": 0.0}, state, params, moved)
    for param, target in zip(params, moved, strict=True):
        assert param.grad is not None
        own_part(param.grad).copy_(target.neg_())


def _vectors(group: dict[str, Any], matrices: Container[int]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None and id(p) not in matrices]


def _adamw(
    group: dict[str, Any],
    state: MutableMapping[Tensor, Any],
    params: list[Tensor],
    targets: list[Tensor],
) -> None:
    """Move the targets, which stand for the parameters (or what this rank has of them)."""
    if not params:
        return
    for param in params:
        if not state[param]:
            state[param].update(
                step=torch.zeros((), dtype=torch.float32),
                exp_avg=torch.zeros_like(own_part(param)),
                exp_avg_sq=torch.zeros_like(own_part(param)),
            )
    states = [state[p] for p in params]
    grads = [own_part(p.grad) for p in params if p.grad is not None]
    means = [s["exp_avg"] for s in states]
    moments = [s["exp_avg_sq"] for s in states]
    adamw(
        targets,
        grads,
        means,
        moments,
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        # A sixth of the time: else each vector takes a dozen calls. Otherwise torch's own choice.
        fused=True if _fusible([*targets, *grads, *means, *moments]) else None,
    )


def _fusible(tensors: list[Tensor]) -> bool:
    """Whether torch's fused AdamW for the CPU takes these tensors for what they are.

    It goes through their memory in step and does not look at strides; it has no complex numbers;
    on other devices it would want the steps there."""
    return all(
        t.device.type == "cpu" and t.is_contiguous() and t.is_floating_point() for t in tensors
    )
