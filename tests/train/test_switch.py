"""The switch in one process: what is announced and installed lies in memory once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.train.depot import Depot, State
from distcurv.train.group import Prints, RankGroup
from distcurv.train.switch import Install, Switch, first_installs
from distcurv.train.table import BlockTable

CPU = torch.device("cpu")
SPECS = [
    BlockSpec(name, "lowrank", (SideSpec(5, 2), SideSpec(d, 3)), 0.9)
    for name, d in (("a", 7), ("b", 4))
]


def switched(news: list[int]) -> tuple[list[Install], Depot, list[torch.Tensor]]:
    """Poll, announce and install version 1 of the blocks ``news``; with its numbers."""
    group = RankGroup(CPU)
    table = BlockTable.make(SPECS, group.nodes(), 1)
    depot = Depot(lambda *args, **fields: None)
    switch = Switch(group, table, depot)
    installed = first_installs(table, 0, CPU)
    numbers = [torch.randn(layout.size, dtype=torch.float32) for layout in table.published_layouts]
    for block, install in enumerate(installed):
        states = [State(0, -1, -1, install.flat)]
        if block in news:
            states.append(State(1, 0, 3, numbers[block].clone(), "worker"))
        depot.reset(block, states)
    switch.begin_poll(4, Prints(0, 0), depot.states)
    switch.announce(installed)
    for block in news:
        assert torch.equal(depot.states(block)[-1].flat, numbers[block])
    return switch.finish(6), depot, numbers


@pytest.fixture(params=[torch.float32, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """What new tensors are where nobody says: no affair of ours."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
def test_what_is_announced_is_installed_where_it_lies() -> None:
    installs, depot, numbers = switched([0, 1])
    assert [(i.block, i.version, i.through, i.route) for i in installs] == [
        (0, 1, 3, "worker"),
        (1, 1, 3, "worker"),
    ]
    places = {install.flat.untyped_storage().data_ptr() for install in installs}
    assert len(places) == 1, "one bucket, and no copies of it"
    for install in installs:
        assert torch.equal(install.flat, numbers[install.block])
        assert install.flat.dtype == torch.float32
        assert depot.states(install.block)[-1].flat.data_ptr() == install.flat.data_ptr()
        # As memory of its own would begin: how products round may depend on that.
        assert install.flat.data_ptr() % 64 == 0


def test_a_block_that_comes_alone_does_not_keep_the_memory_of_others() -> None:
    (install,), depot, numbers = switched([1])
    assert torch.equal(install.flat, numbers[1])
    assert install.flat.untyped_storage().nbytes() == 4 * install.flat.numel()
    assert depot.states(1)[-1].flat.data_ptr() == install.flat.data_ptr()
    assert [state.version for state in depot.states(0)] == [0]
