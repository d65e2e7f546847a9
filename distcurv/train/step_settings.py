"""Damping and learning rate of K-FAC as they hold at a step: numbers, or functions of the step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from distcurv.config import KfacConfig, Schedule
from distcurv.config.checks import is_positive
from distcurv.config.kfac import DAMPED_AT_REFRESH
from distcurv.config.schedule import value_at
from distcurv.errors import ConfigError
from distcurv.train.planning import PlannedBlock

log = logging.getLogger("distcurv.train")


class StepSettings:
    """What may change between two steps, alike on all ranks.

    Args:
        config: where it begins.
        blocks: those with their own damping keep it.
    """

    def __init__(self, config: KfacConfig, blocks: Sequence[PlannedBlock]) -> None:
        self._damping: float | Schedule = config.damping
        self._lr: float | Schedule | None = config.lr
        self._blocks = blocks

    def damping(self, step: int) -> float:
        """Of the blocks without their own.  Raises `ConfigError` where a function gives none that
        works."""
        return _positive(self._damping, step, "damping", "give a number > 0")

    def lr(self, step: int) -> float | None:
        """The learning rate for ``kl_clip``; raises as `damping`."""
        if self._lr is None:
            return None
        return _positive(self._lr, step, "lr", "give None or a number > 0")

    def dampings(self, step: int) -> list[float]:
        """The damping of each block; raises as `damping`."""
        common = self.damping(step)
        return [b.config.damping_at(step) if b.own_damping else common for b in self._blocks]

    def set_damping(self, damping: float | Schedule, step: int) -> None:
        """From ``step`` on.  Raises `ConfigError` for a number that is not > 0, and where a block's
        damping is part of what is published."""
        fixed = [
            block.spec
            for block in self._blocks
            if block.spec.kind in DAMPED_AT_REFRESH and not block.own_damping
        ]
        if fixed:
            kinds = " or ".join(sorted({repr(spec.kind) for spec in fixed}))
            raise ConfigError(
                f"the damping of kind {kinds} is fixed when the preconditioner is made (blocks "
                f"{', '.join(spec.name for spec in fixed)}): set KfacConfig.damping, or use "
                "kind='lowrank'"
            )
        _positive(damping, step, "damping", "give a number > 0")
        self._damping = damping

    def set_lr(self, lr: float | Schedule | None, step: int) -> None:
        """From ``step`` on.  Raises `ConfigError` for a number that is not > 0."""
        if lr is not None:
            _positive(lr, step, "lr", "give None or a number > 0")
        self._lr = lr

    def state(self) -> dict[str, float | None]:
        """The numbers; None where a function says it."""
        return {
            "damping": None if callable(self._damping) else self._damping,
            "lr": None if callable(self._lr) else self._lr,
        }

    def load(self, state: Mapping[str, float | None]) -> None:
        """Take the numbers of a `state`; a function that is in use here goes on with its step."""
        if callable(self._damping):
            _warn_kept("damping", state["damping"])
        elif state["damping"] is not None:
            self._damping = state["damping"]
        if callable(self._lr):
            _warn_kept("lr", state["lr"])
        else:
            self._lr = state["lr"]


def _positive(value: float | Schedule, step: int, name: str, want: str) -> float:
    return float(value_at(value, step, name, is_positive, want))


def _warn_kept(name: str, saved: float | None) -> None:
    if saved is not None:
        log.warning(
            "%s is a function of the step here: the number %g of the loaded state is not used",
            name,
            saved,
        )
