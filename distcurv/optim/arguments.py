"""What the optimizers ask of their arguments, checked at once and in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from distcurv.errors import ConfigError, StateError


def check_options(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Raise `ConfigError` for an option that cannot work."""
    if not float(lr) >= 0:
        raise ConfigError(f"lr is {lr}: give a number >= 0")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"betas is {betas}: give two numbers in [0, 1)")
    if not eps >= 0:
        raise ConfigError(f"eps is {eps}: give a number >= 0")
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay is {weight_decay}: give a number >= 0")


def common_device(params: Sequence[Tensor]) -> torch.device:
    """The one device of the parameters; `ConfigError` when there are several."""
    devices = {p.device for p in params}
    if len(devices) != 1:
        raise ConfigError(
            f"the parameters are on {sorted(map(str, devices))}: put them on one device"
        )
    device = devices.pop()
    if device.type == "meta":
        raise ConfigError(
            "the parameters are on the device meta: give them memory (to_empty) and numbers first"
        )
    return device


def named_params(param_groups: Sequence[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """Parameters of an optimizer's groups with their names (``param<i>`` where they have none)."""
    named: list[tuple[str, Tensor]] = []
    for group in param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for given, param in zip(names, group["params"], strict=True):
            name = given if given is not None else f"param{len(named)}"
            if isinstance(param, UninitializedParameter):
                raise ConfigError(f"parameter {name} is lazy: run the model once before")
            if param.is_complex():
                raise ConfigError(f"parameter {name} is complex: optimize its real view")
            named.append((name, param))
    return named


def refuse_sparse(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise `ConfigError` for a sparse gradient; at every step, so that all ranks raise at one."""
    for name, param in named:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise ConfigError(f"parameter {name} has a sparse gradient: use sparse=False")


def check_groups(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise `StateError` unless a state_dict's param groups have the sizes of the optimizer's."""
    sizes, wanted = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if sizes != wanted:
        raise StateError(
            f"this state_dict has param groups of {sizes} parameters, the optimizer of {wanted}: "
            "load it into an optimizer that was made alike"
        )
