"""Rigs: one for every scheme in the registry, one for tcp alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from link_rig import Rig

from distcurv.wire import SERVERS


@pytest.fixture(params=sorted(SERVERS))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(request.param, tmp_path)
    with rig.stack:
        yield rig


@pytest.fixture
def tcp_rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig("tcp", tmp_path)
    with rig.stack:
        yield rig
