"""Notices optimizers that evaluate the model more often than once a step, which K-FAC cannot serve.

`Preconditioner.step` counts training steps and rewrites the gradients of one backward, once.  An
optimizer that calls a closure several times within its step (torch.optim.LBFGS) makes steps that
are none, and overwrites what was rewritten before.  Two global hooks of torch.optim (none on a
module, none on an optimizer) tell when an optimizer's step begins and ends; and gradients that
have not changed since the last step tell that no backward has come in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from distcurv.errors import StateError

_REMEDY = (
    "use an optimizer that takes each gradient once (SGD, AdamW, ...), and call "
    "Preconditioner.step() once after each backward()"
)


class StepGuard:
    """Watches over the steps of one preconditioner.

    Args:
        covered: ids of the parameters that it rewrites the gradients of.
    """

    def __init__(self, covered: Iterable[int]) -> None:
        self._covered = frozenset(covered)
        self._running: str | None = None  # the optimizer that is in its step
        self._steps_within = 0
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []
        me = weakref.ref(self)
        handles = (
            register_optimizer_step_pre_hook(partial(_before, me)),
            register_optimizer_step_post_hook(partial(_after, me)),
        )
        self._end = weakref.finalize(self, _remove, handles)
        self._end.atexit = False

    def begin(self, grads: Iterable[Tensor | None]) -> None:
        """At the start of a step; ``grads`` are those of the covered parameters.

        Raises `StateError` where the step cannot be one of a training."""
        if self._running is not None and self._steps_within > 0:
            raise StateError(
                "Preconditioner.step() was called twice within one step() of "
                f"{self._running}: it evaluates its closure again, as torch.optim.LBFGS does; "
                f"{_REMEDY}"
            )
        if self._seen and not _changed(self._seen, grads):
            raise StateError(
                "Preconditioner.step() was called twice without a backward() in between, so the "
                "gradients are those that it rewrote before: a closure that does not call "
                f"backward(), or a step too many; {_REMEDY}"
            )

    def end(self, grads: Iterable[Tensor | None]) -> None:
        """At the end of a step."""
        self._steps_within += 1
        # Weak: a gradient that the user lets go of is freed.
        self._seen = [(weakref.ref(grad), grad._version) for grad in grads if grad is not None]

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        self._end()

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS) and not self._covered.isdisjoint(
            id(param) for group in optimizer.param_groups for param in group["params"]
        ):
            raise StateError(
                "torch.optim.LBFGS evaluates its closure several times a step and builds its own "
                f"curvature from plain gradients, so it cannot follow a Preconditioner; {_REMEDY}"
            )
        self._running = type(optimizer).__name__
        self._steps_within = 0

    def _optimizer_ends(self) -> None:
        self._running = None


def _changed(seen: list[tuple[weakref.ref[Tensor], int]], grads: Iterable[Tensor | None]) -> bool:
    """Whether any gradient is another tensor than before, or has been written to since.

    Subclasses (DTensor) keep their numbers elsewhere: of them nothing is known."""
    now = [grad for grad in grads if grad is not None]
    if len(now) != len(seen):
        return True
    return any(
        type(grad) is not Tensor or before() is not grad or grad._version != version
        for grad, (before, version) in zip(now, seen, strict=True)
    )


def _before(
    guard: weakref.ref[StepGuard], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
) -> None:
    mine = guard()
    if mine is not None:
        mine._optimizer_begins(optimizer)


def _after(
    guard: weakref.ref[StepGuard], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
) -> None:
    mine = guard()
    if mine is not None:
        mine._optimizer_ends()


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
