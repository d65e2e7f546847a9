"""Which rows captured calls look at: fresh ones at every step, the same ones in every replay.

A draw is a function of seed, step and call alone, so neither the order in which gradients arrive
nor a restart from a checkpoint changes it.  Ranks give different seeds: their statistics are added.
"""

from __future__ import annotations

import hashlib

from distcurv.curvature.row_draw import Sampler


class StepRows:
    """The draws of one step.

    The k-th calls of all blocks share their random number, and so do both sides of a call: each
    factor stays unbiased.

    Args:
        max_rows: at most so many rows of a call are looked at; None for all.
        seed: of this rank.
        step: the training step.
    """

    def __init__(self, max_rows: int | None, seed: int, step: int) -> None:
        self._max_rows = max_rows
        self._text = f"rows {seed} {step}"

    def of_call(self, call: int) -> Sampler | None:
        """What chooses the rows of the step's ``call``-th call of a block; None for all rows."""
        if self._max_rows is None:
            return None
        digest = hashlib.sha256(f"{self._text} {call}".encode()).digest()
        return Sampler(self._max_rows, int.from_bytes(digest[:16], "big"))
