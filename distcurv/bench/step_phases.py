"""Tells apart what a step spends its time on, without the methods knowing of it.

Times are exclusive: when a phase begins inside another, the outer one's time stands still.  On
CUDA every change of phase waits for the device, so what would overlap is counted one after the
other, in each method alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from distcurv.bench.clock import now
from distcurv.errors import StateError

# In the order in which they are reported.
PHASES = ("forward_backward", "capture", "exchange", "refresh", "apply")


class PhaseClock:
    """Seconds of one step by phase.  `start`, then phases, then `stop`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._stack: list[str] = []
        self._mark = 0.0
        self.spent: dict[str, float] = {}

    def start(self, phase: str) -> None:
        """A step begins, with this phase."""
        self.spent = {}
        self._stack = [phase]
        self._mark = now(self._device)

    def to(self, phase: str) -> None:
        """The outermost phase ends and another takes its place."""
        self._charge()
        self._stack[-1] = phase

    def stop(self) -> dict[str, float]:
        """The step ends; seconds by phase."""
        self._charge()
        self._stack = []
        return self.spent

    def watch(self, owner: object, method: str, phase: str) -> None:
        """From now on count what ``owner.method`` takes as ``phase``.

        Raises:
            StateError: there is no such method; the benchmark must follow the code it watches.
        """
        inner: Callable[..., Any] | None = getattr(owner, method, None)
        if inner is None:
            raise StateError(
                f"bench step watches {type(owner).__name__}.{method}, which does not exist: adapt "
                "distcurv/bench/step_methods.py"
            )
        watched = inner

        @wraps(watched)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:  # outside a step
                return watched(*args, **kwargs)
            self._charge()
            self._stack.append(phase)
            try:
                return watched(*args, **kwargs)
            finally:
                self._charge()
                self._stack.pop()

        setattr(owner, method, timed)

    def _charge(self) -> None:
        time = now(self._device)
        phase = self._stack[-1]
        self.spent[phase] = self.spent.get(phase, 0.0) + time - self._mark
        self._mark = time
