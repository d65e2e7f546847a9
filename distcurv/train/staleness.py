"""How stale the installed versions are: told from what is installed, hence alike on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from distcurv.config import ServiceConfig
from distcurv.train.switch import Install

log = logging.getLogger("distcurv.train")


def staleness(install: Install, step: int) -> int:
    """Steps since the one that the installed version is based on; 0 before the first install."""
    return step - install.through if install.version else 0


class StalenessWatch:
    """Keeps the worst staleness seen, and warns once when it passes its bound.

    Args:
        config: the policy.
        emit: event sink.
    """

    def __init__(self, config: ServiceConfig, emit: Callable[..., None]) -> None:
        self._config = config
        self._emit = emit
        self._warned = False
        self.worst = 0

    def look(self, installed: Sequence[Install], step: int, bound: int) -> None:
        """Take note of a step, at which ``bound`` holds."""
        worst = max((staleness(install, step) for install in installed), default=0)
        self.worst = max(self.worst, worst)
        if worst > bound and not self._warned:
            self._warned = True
            text = (
                f"staleness {worst} is past max_staleness {bound} at step {step}: policy "
                f"{self._config.staleness_policy!r} acts"
            )
            log.warning(text)
            self._emit("warning", text=text)
