"""The factors of samples' gradients of Linear and convolution layers, caught during a step.

A sample's gradient of such a layer is the sum over positions of (output gradient) (input)ᵀ.  Both
are caught by hooks: inputs in the forward, output gradients in the user's own backward.

Shapes: N samples, S positions, I inputs (with the bias coordinate), O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.curvature.seng import Samples
from distcurv.errors import CaptureError
from distcurv.layers import find_layer
from distcurv.layers.conv import ConvIO
from distcurv.layers.linear import LinearIO
from distcurv.layers.transposed_linear import TransposedLinearIO
from distcurv.train.eager import hold_eager

_TYPES = (LinearIO, TransposedLinearIO, ConvIO)


def factored_layer(module: nn.Module) -> LinearIO | ConvIO | None:
    """The layer whose gradient has such factors; None for other modules (also for layer types that
    do more than those here), grouped convolutions and frozen weights."""
    layer = find_layer(module)
    if not isinstance(layer, LinearIO | ConvIO) or type(layer) not in _TYPES:
        return None
    grouped = getattr(module, "groups", 1) != 1
    return None if grouped or layer.refuse(module) is not None else layer


class Catch:
    """What the modules are called with, and the gradients of what they return, while it lasts.

    A module that is called several times has the positions of all calls."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._caught: dict[str, list[Samples]] = {}

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Catch; compiled code, whose modules run no hooks, is eager meanwhile."""
        release = hold_eager()
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            release()

    def samples(self, name: str) -> Samples | None:
        """The factors of a module, of the gradient of the loss as it was; None where no gradient
        has come.  Raises `CaptureError` where calls differ in their numbers of samples."""
        calls = self._caught.get(name)
        if not calls:
            return None
        if len({len(call.a_NSI) for call in calls}) > 1:
            raise CaptureError(
                f"module {name} was called with {[len(call.a_NSI) for call in calls]} samples in "
                "one step: its samples' gradients cannot be told apart"
            )
        return Samples(
            torch.cat([call.a_NSI for call in calls], 1),
            torch.cat([call.g_NSO for call in calls], 1),
        )

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach()

            def caught(grad: Tensor) -> None:
                call = _factors(module, x, grad.detach())
                self._caught.setdefault(name, []).append(call)

            output.register_hook(caught)

        return hook


def _factors(module: nn.Module, x: Tensor, grad: Tensor) -> Samples:
    layer = factored_layer(module)
    assert layer is not None
    wanted = 2 + len(module.kernel_size) if isinstance(layer, ConvIO) else 2  # type: ignore[arg-type]
    if x.dim() < wanted:
        raise CaptureError(
            f"a {type(module).__name__} got an input of shape {tuple(x.shape)}: without a batch "
            "dimension samples cannot be counted; give it x.unsqueeze(0)"
        )
    if isinstance(layer, ConvIO):
        windows = layer.windows(module)
        everywhere = tuple(slice(None) for _ in grad.shape[2:])
        patches = windows.patches(windows.padded(x), everywhere)
        a_NSI = patches.view(len(x), grad.shape[2:].numel(), patches.shape[-1])
        g_NSO = grad.flatten(2).mT
    else:
        positions = x.shape[1:-1].numel()  # said, since of no samples it cannot be found
        a_NSI = x.reshape(len(x), positions, x.shape[-1])
        g_NSO = grad.reshape(len(x), positions, grad.shape[-1])
    if layer.trains_bias(module):
        a_NSI = torch.cat([a_NSI, a_NSI.new_ones(*a_NSI.shape[:2], 1)], 2)
    # Under autocast the two may differ, and no product should be in half precision.
    dtype = torch.promote_types(module.get_parameter("weight").dtype, torch.float32)
    return Samples(a_NSI.to(dtype), g_NSO.to(dtype))
