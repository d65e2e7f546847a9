"""What is no matrix gets AdamW's rule, by PyTorch's own implementation of it."""

from __future__ import annotations

from collections.abc import Container, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def update_vectors(
    group: dict[str, Any], state: MutableMapping[Tensor, Any], matrices: Container[int]
) -> None:
    """AdamW's rule for a group's parameters that are no matrices.

    Args:
        group: a param group with lr, betas, eps and weight_decay.
        state: the optimizer's state by parameter.
        matrices: ids of the parameters that are matrices.
    """
    params = [p for p in group["params"] if p.grad is not None and id(p) not in matrices]
    if not params:
        return
    for param in params:
        if not state[param]:
            state[param].update(
                step=torch.zeros((), dtype=torch.float32),
                exp_avg=torch.zeros_like(param),
                exp_avg_sq=torch.zeros_like(param),
            )
    states = [state[p] for p in params]
    adamw(
        params,
        [p.grad for p in params],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
