"""`workers=` turned into links: what cannot work is refused at once, and ``auto`` follows its
rule."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from distcurv import wiring
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ConfigError, LaunchError
from distcurv.launcher import supervisor
from distcurv.train.cores import Cores
from distcurv.train.group import RankGroup
from distcurv.train.placement import Load
from distcurv.wiring import ENDPOINTS_VARIABLE, owner_links

ONE, TWO = "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556"
DENSE = SideSpec(4096, 4096, "none", "dense")
# Far from the line on either side of it, whatever the rule is calibrated to.
HEAVY = Load((BlockSpec("heavy", "dense", (DENSE, DENSE), 0.9, 1e-3),), (0,), 1)
LIGHT = Load((BlockSpec("light", "lowrank", (SideSpec(8, 2), SideSpec(8, 2)), 0.9),), (0,), 1000)


@pytest.fixture
def group() -> RankGroup:
    return RankGroup(torch.device("cpu"))


def test_endpoints_keep_their_order(group: RankGroup) -> None:
    links = owner_links([TWO, ONE], group, HEAVY)
    assert [endpoint for endpoint, _ in links.remotes] == [TWO, ONE]
    links.close()


def test_a_worker_named_twice_is_refused(group: RankGroup) -> None:
    # It would take the owner's second session for a restart and end the first, for ever.
    with pytest.raises(ConfigError, match=f"workers names {ONE} more than once"):
        owner_links([ONE, TWO, ONE], group, LIGHT)


def test_a_worker_named_twice_in_the_environment_too(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS_VARIABLE, f"{ONE},{ONE}")
    with pytest.raises(ConfigError, match="more than once"):
        owner_links("auto", group, LIGHT)


@pytest.mark.parametrize("workers", [[], 3, True, None, ONE, [5]])
def test_other_forms_are_refused(group: RankGroup, workers: object) -> None:
    with pytest.raises(ConfigError, match="workers"):
        owner_links(workers, group, LIGHT)  # type: ignore[arg-type]


class Spawned:
    """In place of the supervisor: says what it was asked, and starts nothing."""

    made: list[Spawned]
    fails = False

    def __init__(self, workers: int) -> None:
        self.workers, self.closed = workers, False
        self.endpoints = [ONE]
        Spawned.made.append(self)

    def __enter__(self) -> Spawned:
        if self.fails:
            raise LaunchError("worker0 died")
        return self

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> type[Spawned]:
    monkeypatch.delenv(ENDPOINTS_VARIABLE, raising=False)
    monkeypatch.setattr(supervisor, "Supervisor", Spawned)
    monkeypatch.setattr(Spawned, "made", [], raising=False)
    return Spawned


def use_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    cores = Cores(frozenset(range(count)), count)
    monkeypatch.setattr(wiring, "own_cores", lambda: cores)


@pytest.mark.parametrize(
    ("load", "cores", "spawns"), [(HEAVY, 2, True), (HEAVY, 1, False), (LIGHT, 2, False)]
)
def test_auto_follows_the_rule_and_says_so_once(
    load: Load,
    cores: int,
    spawns: bool,
    group: RankGroup,
    spawned: type[Spawned],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_cores(monkeypatch, cores)
    with caplog.at_level(logging.INFO, "distcurv"):
        links = owner_links("auto", group, load)
    assert [endpoint for endpoint, _ in links.remotes] == ([ONE] if spawns else [])
    assert [one.workers for one in spawned.made] == ([1] if spawns else [])
    (said,) = [r.getMessage() for r in caplog.records if r.name == "distcurv"]
    assert said.startswith(
        'workers="auto" means ' + ("a worker on each node: " if spawns else "refreshing in process")
    )
    links.close()
    assert all(one.closed for one in spawned.made)


def test_endpoints_of_the_environment_are_used_whatever_the_rule_says(
    group: RankGroup, spawned: type[Spawned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINTS_VARIABLE, f"{TWO}, {ONE}")
    use_cores(monkeypatch, 1)
    links = owner_links("auto", group, LIGHT)
    assert [endpoint for endpoint, _ in links.remotes] == [TWO, ONE]
    assert not spawned.made
    links.close()


def test_what_is_asked_for_is_not_decided_again(
    group: RankGroup, spawned: type[Spawned], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cores(monkeypatch, 64)
    assert not owner_links("inline", group, HEAVY).remotes
    assert len(owner_links([TWO], group, LIGHT).remotes) == 1
    assert not spawned.made


def test_a_worker_that_cannot_start_is_an_error(
    group: RankGroup, spawned: type[Spawned], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cores(monkeypatch, 2)
    monkeypatch.setattr(spawned, "fails", True)
    with pytest.raises(LaunchError, match="worker0 died"):
        owner_links("auto", group, HEAVY)


def test_auto_starts_a_true_worker_and_ends_it(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENDPOINTS_VARIABLE, raising=False)
    use_cores(monkeypatch, 2)
    made: list[supervisor.Supervisor] = []
    true = supervisor.Supervisor

    def remembered(workers: int) -> supervisor.Supervisor:
        made.append(true(workers=workers))
        return made[-1]

    monkeypatch.setattr(supervisor, "Supervisor", remembered)
    links = owner_links("auto", group, HEAVY)
    try:
        ((_, connect),) = links.remotes
        connect().close()
        (pid,) = made[0].pids
        os.kill(pid, 0)
    finally:
        links.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
