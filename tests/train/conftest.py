"""What the tests of the training side share: a connector of their own, and no thread left over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from distcurv.train import provider

_DEADLINE = 60.0  # seconds for a thread that was told to end


def _ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("distcurv-")}


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """Every thread that a test started through distcurv has ended after it."""
    before = _ours()
    yield
    deadline = time.monotonic() + _DEADLINE
    left = _ours() - before
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [t.name for t in left if t.is_alive()]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def connect_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[provider.Connector], None]:
    """Make a connector the source of links until the test ends."""

    def use(connector: provider.Connector) -> None:
        monkeypatch.setattr(provider, "_connector", [connector])

    return use
