"""``install_delay=k`` over sockets equals the in-process run bit for bit, and is exact."""

from __future__ import annotations

import pytest
from distributed_tasks import DOORS, Run

from distcurv.launcher.supervisor import Supervisor

INTERVAL = 10
EARLY = 10
STEPS = 64


@pytest.mark.parametrize("delay", [0, 3, 25])
@pytest.mark.parametrize("door", [door for door in DOORS if door != "soap-full"])
def test_sockets_and_memory_give_the_same_bits(worker: Supervisor, door: str, delay: int) -> None:
    settings = {
        "preconditioner_upd_interval": INTERVAL,
        "early_steps": EARLY,
        "install_delay": delay,
        "link_timeout": 60.0,
    }
    with Run(door, "inline", **settings) as inline:
        inline.steps(STEPS)
    with Run(door, worker.endpoints, **settings) as remote:
        remote.steps(STEPS)
        assert remote.metrics()["links_up"] == 1
    assert remote.door.install_log == inline.door.install_log
    assert remote.checksum() == inline.checksum()
    # The worker made all versions after the early phase.
    late = [record for record in remote.door.install_log if record[0] >= EARLY]
    assert remote.metrics()["versions_from_workers"] >= len(late) > 0
    # A version based on step t is installed at t + k, for every t at which a window closes.
    assert {(step, through) for step, _, _, _, through in late} == {
        (t + delay, t) for t in range(EARLY, STEPS - delay, INTERVAL)
    }
