from __future__ import annotations

import pytest
from worker_fakes import FakeKind, Script

from distcurv.curvature.kinds import KINDS
from distcurv.worker.settings import WorkerSettings


@pytest.fixture
def fake_kind(monkeypatch: pytest.MonkeyPatch) -> FakeKind:
    kind = FakeKind()
    monkeypatch.setitem(KINDS, kind.name, kind)
    return kind


@pytest.fixture
def script() -> Script:
    return Script(WorkerSettings(heartbeat=1.0, session_timeout=10.0, max_queued=2, max_bases=4))
