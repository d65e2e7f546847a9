from __future__ import annotations

import pytest
from worker_fakes import FakeKind

from distcurv.curvature.kinds import KINDS


@pytest.fixture
def fake_kind(monkeypatch: pytest.MonkeyPatch) -> FakeKind:
    kind = FakeKind()
    monkeypatch.setitem(KINDS, kind.name, kind)
    return kind
