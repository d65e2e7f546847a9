"""Tells apart what a step spends its time on, without the methods knowing of it.

Times are exclusive: when a phase begins inside another, the outer one's time stands still.  On
CUDA the marks are events on the stream: a phase has the time that the device spends between two
marks, and no change of phase makes the host wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch

from distcurv.errors import StateError

# In the order in which they are reported.
PHASES = (
    "forward_backward", "capture", "reduce_send", "install", "refresh", "apply", "optimizer"
)  # fmt: skip

# From its time on, a phase runs; the last one of a step has no name.
Mark = tuple[str, "float | torch.cuda.Event"]


class PhaseClock:
    """Marks of one step.  `start`, then phases, then `stop`.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self._stack: list[str] = []
        self._marks: list[Mark] = []

    def start(self, phase: str) -> None:
        """A step begins, with this phase."""
        self._stack = [phase]
        self._marks = []
        self._mark(phase)

    def to(self, phase: str) -> None:
        """The outermost phase ends and another takes its place."""
        self._stack[-1] = phase
        self._mark(phase)

    def stop(self) -> Sequence[Mark]:
        """The step ends; what `seconds` reads."""
        self._mark("")
        self._stack = []
        return self._marks

    def watch(self, owner: object, method: str, phase: str) -> None:
        """From now on count what ``owner.method`` takes as ``phase``.

        Raises:
            StateError: there is no such method; the benchmark must follow the code it watches.
        """
        inner: Callable[..., Any] | None = getattr(owner, method, None)
        if inner is None:
            raise StateError(
                f"bench step watches {type(owner).__name__}.{method}, which does not exist: adapt "
                "distcurv/bench/step_hooks.py"
            )
        watched = inner

        @wraps(watched)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:  # outside a step
                return watched(*args, **kwargs)
            self._stack.append(phase)
            self._mark(phase)
            try:
                return watched(*args, **kwargs)
            finally:
                self._stack.pop()
                self._mark(self._stack[-1])

        setattr(owner, method, timed)

    def _mark(self, phase: str) -> None:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))


def seconds(marks: Sequence[Mark]) -> dict[str, float]:
    """Seconds by phase between the marks of a step; on CUDA, once the device is synchronised."""
    spent: dict[str, float] = {}
    for (phase, begin), (_, end) in pairwise(marks):
        if isinstance(begin, float) and isinstance(end, float):
            lasted = end - begin
        elif not isinstance(begin, float) and not isinstance(end, float):
            lasted = 1e-3 * begin.elapsed_time(end)
        else:
            raise StateError("a step's marks are of two clocks: make one PhaseClock for a method")
        spent[phase] = spent.get(phase, 0.0) + lasted
    return spent
