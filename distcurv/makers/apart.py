"""Runs of the user's model apart from training, for derivatives.

Buffers are left as they are, DistributedDataParallel does not start its reductions, compiled code
runs eagerly, attention by its plain formula and recurrent layers without cuDNN: none of the last
three can be differentiated twice otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from distcurv.train.discover import bare_model
from distcurv.train.eager import hold_eager


def run_apart(
    model: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    params: Mapping[str, Tensor] | None = None,
) -> Any:
    """``function(*args, **kwargs)``, which calls the model in one way or another.

    Args:
        params: instead of the model's own, by their names in the bare model.
    """
    bare = bare_model(model)
    # What a forward writes into buffers (running statistics) is written into copies.
    replaced = {f"model.{name}": buffer.clone() for name, buffer in bare.named_buffers()}
    replaced.update({f"model.{name}": value for name, value in (params or {}).items()})
    with apart(model, function):
        return functional_call(_Caller(bare), replaced, (function, args, kwargs))


@contextmanager
def apart(model: nn.Module, function: object) -> Iterator[None]:
    """While this lasts, compiled code is eager, cuDNN runs no recurrent layer, and a wrapper's
    forward is that of what it wraps."""
    release = hold_eager()
    roots = [model, function, getattr(function, "__self__", None)]
    wrappers = {
        id(module): module
        for root in roots
        if isinstance(root, nn.Module)
        for module in root.modules()
        if isinstance(module, DistributedDataParallel)
    }
    for wrapper in wrappers.values():
        vars(wrapper)["forward"] = wrapper.module
    recurrent = any(isinstance(m, nn.RNNBase) for m in bare_model(model).modules())
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), _cudnn(off=recurrent):
            yield
    finally:
        for wrapper in wrappers.values():
            del vars(wrapper)["forward"]
        release()


@contextmanager
def _cudnn(*, off: bool) -> Iterator[None]:
    """Off only where it must be: convolutions are slow without it."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and not off
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


class _Caller(nn.Module):
    """What `functional_call` needs to replace tensors of a model while anything runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return function(*args, **kwargs)
