"""What the tests of the optimizers share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """Every thread that a test started through distcurv has ended after it."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 60.0
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("distcurv-")]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [t.name for t in left if t.is_alive()]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
