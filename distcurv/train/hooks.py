"""The hooks that a capture lives on while it is armed, and how they are taken away.

All of them hold the capture weakly: they are global and must not keep a forgotten capture, and its
model, alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
)
from torch.utils.hooks import RemovableHandle

from distcurv.errors import CaptureError
from distcurv.train.calls import Arming, Call
from distcurv.train.captured_block import CapturedBlock
from distcurv.train.eager import hold_eager
from distcurv.train.function_calls import FunctionWatch
from distcurv.train.uses import Use


class Watcher(Protocol):
    """What the hooks need of a capture."""

    @property
    def arming(self) -> Arming | None:
        """What is watched now."""
        ...

    def observe(
        self, arming: Arming, block: CapturedBlock, use: Use, input: Tensor, out: Tensor
    ) -> None:
        """A module or a function has used a due block."""
        ...

    def deliver(self, call: Call, grad_output: Tensor) -> None:
        """The gradient of a call's output has arrived."""
        ...

    def make_statistics(self) -> None:
        """Deliver what has arrived."""
        ...


def watch(capture: Watcher, by_calls: Sequence[CapturedBlock]) -> weakref.finalize[..., Any]:
    """Begin to call ``capture.observe``; calling what is returned ends it, as the end of the
    capture's life does.

    Args:
        by_calls: the blocks that functions use and no module stands for.
    """
    capture_ref = weakref.ref(capture)
    release_eager = hold_eager()
    handle = register_module_forward_hook(partial(_forward_hook, capture_ref), with_kwargs=True)
    functions = FunctionWatch(by_calls, partial(_function_hook, capture_ref))
    unwatch = weakref.finalize(capture, _unwatch, handle, functions, release_eager)
    unwatch.atexit = False
    functions.install()
    return unwatch


def _forward_hook(
    capture_ref: weakref.ref[Watcher],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    capture = capture_ref()
    if capture is None or capture.arming is None:
        return
    for block, use in capture.arming.places.get(id(module), ()):
        named = [kwargs["input"]] if "input" in kwargs else []
        input = _first_tensor([*args, *named, *kwargs.values()])
        outputs = output.values() if isinstance(output, Mapping) else output
        out = _first_tensor([output] if isinstance(output, Tensor) else outputs)
        if input is None or out is None:
            what = "was called with" if input is None else "returned"
            raise CaptureError(
                f"block {block.name!r}: its {type(module).__name__} {what} no tensor, so it cannot "
                "be captured; leave it out with ignore_modules"
            )
        capture.observe(capture.arming, block, use, input, out)


def _first_tensor(values: object) -> Tensor | None:
    """The first tensor of some arguments, or of what a module returned beside other things."""
    if not isinstance(values, Iterable):
        return None
    return next((value for value in values if isinstance(value, Tensor)), None)


def _function_hook(
    capture_ref: weakref.ref[Watcher],
    block: CapturedBlock,
    use: Use,
    input: Tensor,
    output: Tensor,
) -> None:
    capture = capture_ref()
    if capture is not None and capture.arming is not None:
        capture.observe(capture.arming, block, use, input, output)


def _unwatch(
    handle: RemovableHandle, functions: FunctionWatch, release_eager: Callable[[], None]
) -> None:
    handle.remove()
    # What torch's handle forgets: an entry for each hook that takes keyword arguments.
    _global_forward_hooks_with_kwargs.pop(handle.id, None)
    functions.restore()
    release_eager()


def gradient_hook(capture_ref: weakref.ref[Watcher], call: Call, grad: Tensor | None) -> None:
    """The gradient of a call's output."""
    capture = capture_ref()
    if capture is not None and grad is not None:
        capture.deliver(call, grad)


def end_of_backward(capture_ref: weakref.ref[Watcher]) -> None:
    """The backward in which gradients arrived has ended."""
    capture = capture_ref()
    if capture is not None:
        capture.make_statistics()
