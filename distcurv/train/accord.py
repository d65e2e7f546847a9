"""How all ranks come to raise when they disagree, although one of them is an iteration behind.

A rank that skipped a step() is in the backward of the next iteration, where it waits for the
others in DDP's all-reduce.  If they waited for it inside their step(), or raised at once, none of
them would ever come to that all-reduce.  So no wait for a rank that may be behind is without an
end: after it `step()` returns with nothing done, the others' backward goes through, and the next
`step()` meets the late rank and raises on all.
"""

from __future__ import annotations

import torch.distributed as dist

from distcurv.errors import MismatchError
from distcurv.train.group import Poll, Prints, RankGroup

# Seconds.  All ranks come out of one reduction of the gradients, so what separates them at a
# step() is what the user does between backward() and step().
MEETING_PATIENCE = 60.0
# Ranks that learned of a mismatch from one all-reduce in the same step() are closer than that.
FAREWELL_PATIENCE = 10.0

_ABSENT = (
    "a training rank did not come to step() in time: it skipped a step(), hangs or has ended; "
    "every rank must call step() once per training step"
)


class Accord:
    """Finds out whether all ranks are at the same step, and ends the run on all of them if not.

    Args:
        digest: hash of the block table, compared at each meeting.
    """

    def __init__(self, group: RankGroup, digest: int) -> None:
        self._group = group
        self._digest = digest
        self._meeting: Poll | None = None
        self._error: MismatchError | None = None
        self._farewell: dist.Work | None = None

    def meet(self, step: int, prints: Prints) -> bool:
        """Before a step that waits for other ranks: whether all have come to it.

        False: one has not within `MEETING_PATIENCE`; do nothing in this step, the next raises.
        Raises `MismatchError` where the ranks disagree."""
        self._meeting = self._group.begin_poll(step, self._digest, prints, [])
        if not self._group.arrived(self._meeting.work, MEETING_PATIENCE):
            return False
        meeting, self._meeting = self._meeting, None
        self._group.finish_poll(meeting)
        return True

    def part(self, error: MismatchError) -> None:
        """Raise ``error`` as soon as all ranks know of the mismatch: now, or in the next step."""
        self._error = error
        self._farewell = self._group.begin_farewell()
        if self._group.arrived(self._farewell, FAREWELL_PATIENCE):
            raise error

    def settled(self) -> bool:
        """At the start of a step: raise what an earlier one had to leave open.

        False: that has to be left open once more; do nothing in this step."""
        if self._error is not None:
            self._group.arrived(self._farewell, MEETING_PATIENCE)
            raise self._error
        if self._meeting is None:
            return True
        meeting, self._meeting = self._meeting, None
        if not self._group.arrived(meeting.work, MEETING_PATIENCE):
            raise MismatchError(_ABSENT)
        try:
            self._group.finish_poll(meeting)
        except MismatchError as error:
            self.part(error)
            return False
        raise MismatchError(_ABSENT)
