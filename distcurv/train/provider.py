"""Where the training side gets its links from, without importing the worker side.

The package registers `distcurv.wiring`'s connector when it is imported; tests register others.
Here is also what a job calls itself: a random id, drawn by rank 0 and broadcast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distcurv.errors import StateError

if TYPE_CHECKING:  # the package registers here when it is imported, and loads no torch for it
    from distcurv.train.group import RankGroup
    from distcurv.train.lanes import OwnerLinks
    from distcurv.train.placement import Load

Workers = int | str | Sequence[str]
Connector = Callable[[Workers, "RankGroup", "Load"], "OwnerLinks"]
Emit = Callable[..., None]

_connector: list[Connector] = []
_events: list[Callable[[str], Emit]] = []


def register_connector(connector: Connector) -> None:
    """Make ``connector`` the source of links for pipelines made from now on."""
    _connector[:] = [connector]


def register_events(sink: Callable[[str], Emit]) -> None:
    """Make ``sink(who)`` the source of event sinks."""
    _events[:] = [sink]


def event_sink(rank: int) -> Emit:
    """Where this rank's events go; nowhere when nothing is registered."""
    return _events[0](f"rank{rank}") if _events else lambda *args, **fields: None


def owner_links(workers: Workers, group: RankGroup, load: Load) -> OwnerLinks:
    """Links for this rank, as ``workers=`` asks for them; ``load`` is what ``"auto"`` decides by.

    Called on all ranks together."""
    if not _connector:
        raise StateError("no connector is registered: import distcurv, not a part of it")
    return _connector[0](workers, group, load)


def job_identity(group: RankGroup) -> tuple[bytes, int]:
    """The job's random id and its generation (torchrun's restart count), equal on all ranks."""
    import torch

    words = torch.frombuffer(bytearray(os.urandom(16)), dtype=torch.int64)
    job = group.from_rank_zero(words.clone()).numpy().tobytes()
    return job, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
