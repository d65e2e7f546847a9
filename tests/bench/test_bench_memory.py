"""The memory of a method is measured in a process of its own."""

from __future__ import annotations

import pytest

from distcurv.bench.step_memory import peak_of
from distcurv.errors import LaunchError

REQUEST = {
    "model": "autoencoder", "device": "cpu", "worker": "inline", "rank": 8, "interval": 4,
    "capture_interval": 2,
}  # fmt: skip


def test_adamw_holds_one_moment_more_than_sgd() -> None:
    sgd, adamw = (peak_of({"method": name, **REQUEST}) for name in ("sgd", "adamw"))
    parameters = 2.8e6  # of the autoencoder, in float32
    # One second moment more; allocators round, so half of it is what must be seen.
    assert adamw - sgd > 0.5 * 4 * parameters


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(LaunchError, match=r"lion.*KeyError"):
        peak_of({"method": "lion", **REQUEST})
