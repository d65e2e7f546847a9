"""Whether a state_dict fits a maker, before anything of it is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from distcurv.errors import StateError


def fitting_tensors(
    state_dict: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    required: Collection[str],
    device: torch.device,
    who: str,
) -> dict[str, Tensor]:
    """The tensors of a state_dict, all but ``step``, on a device.

    Args:
        shapes: of all that may be there.
        required: the names of those that must.
        who: the maker.

    Raises `StateError` for what is missing, unknown, no tensor or of another shape.
    """
    tensors = {name: value for name, value in state_dict.items() if name != "step"}
    missing = sorted(set(required) - tensors.keys())
    if missing:
        raise StateError(f"this state_dict has no {missing[0]!r}: it is not of this {who}")
    for name, value in tensors.items():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if found != shapes.get(name):
            raise StateError(
                f"this state_dict has {name!r} {found}: this {who} has {shapes.get(name)}; "
                "was it made for another model?"
            )
    return {name: value.to(device) for name, value in tensors.items()}
