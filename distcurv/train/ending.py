"""Ending an owner's threads, in a form that a finalizer can call at interpreter exit."""

from __future__ import annotations

from distcurv.train.lanes import Lanes


def close_lanes(lanes: Lanes, timeout: float) -> None:
    """Close all lanes, waiting at most ``timeout`` seconds for each thread."""
    lanes.close(timeout)
