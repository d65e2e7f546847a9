"""Blocks that travel as float16, on the owner: what leaves, what becomes of what comes, bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import orthogonality_error, orthonormal
from torch import Tensor, nn
from train_rig import (
    DEADLINE,
    Events,
    ScriptedLink,
    block_spec,
    filled_depot,
    job_info,
    outgoing,
    published,
)

from distcurv.config import KfacConfig, SoapConfig
from distcurv.curvature.narrow import Sent, as_received, join, split
from distcurv.curvature.spec import BlockSpec, SideSpec
from distcurv.errors import ConfigError
from distcurv.optim.matrices import find_matrices, matrix_spec
from distcurv.train.conversation import Conversation, Parcel, SessionLost
from distcurv.train.courier import Courier
from distcurv.train.depot import InFlight
from distcurv.train.placement import exchanged_bytes, inline_seconds, worker_seconds
from distcurv.train.planning import plan_blocks
from distcurv.train.table import BlockTable
from distcurv.wire.messages import NOTHING, Hello, Message, Published, Seed, Statistics, Welcome


def narrow(spec: BlockSpec) -> BlockSpec:
    return dataclasses.replace(spec, wire_dtype="float16")


def answer(message: Message) -> list[Message | Exception]:
    return [Welcome(message.session, 1, "cpu")] if isinstance(message, Hello) else []


class Talk:
    """An open session about a narrow block and one that travels as float32."""

    def __init__(self) -> None:
        self.events = Events()
        self.table = BlockTable.make([narrow(block_spec("w0")), block_spec("w1")], (0,), 8)
        self.depot = filled_depot(self.table, self.events)
        self.link = ScriptedLink(answer)
        job = job_info(self.table, emit=self.events)
        self.conversation = Conversation(self.link, job, self.depot, "worker")
        self.conversation.pump(0.0)
        assert self.conversation.open

    def send(self) -> Statistics:
        blocks = [0, 1]
        out = outgoing(self.table, blocks)
        self.depot.depart(blocks, InFlight(self.conversation.session, 0, *out.span))
        seeds = {block: self.depot.states(block) for block in blocks}
        sent = split(self.table.statistic_layouts, out.payload)
        assert self.conversation.send_statistics(Parcel(0, out, seeds, sent, fetched=True))
        return self.link.sent_of(Statistics)[-1]

    def versions_flat(self) -> Tensor:
        """A version of both blocks, as a worker makes them."""
        parts = []
        for seed, layout in enumerate(self.table.published_layouts):
            tensors = {name: torch.rand(shape) for name, shape in layout.shapes.items()}
            for name in ("A.U", "G.U"):
                tensors[name] = orthonormal(*layout.shapes[name], seed=seed).float()
            parts.append(layout.pack(tensors))
        return torch.cat(parts)

    def hear(self, message: Published) -> None:
        self.link.say(message)
        self.conversation.pump(0.0)


def of(statistics: Statistics, sent: Sent) -> Published:
    return dataclasses.replace(published(statistics, [1, 1], sent.payload), narrow=sent.narrow)


def test_seeds_are_whole_and_statistics_are_not() -> None:
    talk = Talk()
    statistics = talk.send()
    (seed,) = talk.link.sent_of(Seed)
    sizes = [layout.size for layout in talk.table.published_layouts]
    assert seed.payload.dtype == torch.float32 and seed.payload.numel() == sum(sizes)
    wide, half = statistics.payload, statistics.narrow
    assert half.dtype == torch.float16 and half.numel() == (6 + 4) * 2  # Y of block 0
    # In place of each matrix its columns' scales.
    assert wide.numel() == sum(layout.size for layout in talk.table.statistic_layouts) - 20 + 4


def test_a_version_is_installed_as_the_worker_keeps_it() -> None:
    talk = Talk()
    statistics, flat = talk.send(), talk.versions_flat()
    layouts = talk.table.published_layouts
    sent = split(layouts, flat)
    talk.hear(of(statistics, sent))
    first, second = torch.split(flat, [layout.size for layout in layouts])
    got = [talk.depot.states(block)[-1] for block in (0, 1)]
    assert [state.version for state in got] == [1, 1]
    assert torch.equal(got[0].flat, as_received(layouts[0], split(layouts[:1], first)))
    assert torch.equal(got[1].flat, second)
    for name, tensor in layouts[0].views(got[0].flat).items():
        if name.endswith(".U"):
            assert orthogonality_error(tensor) < 1e-6
    nbytes = sent.payload.nbytes + sent.narrow.nbytes
    assert nbytes == sum(layout.nbytes for layout in layouts) == 4 * (flat.numel() + 4) - 2 * 20
    assert talk.depot.counts.bytes_in == nbytes
    assert [event["bytes"] for event in talk.events.of("published_received")] == [nbytes]


@pytest.mark.parametrize("which", ["all float32", "too few", "too many", "other dtypes"])
def test_a_version_of_other_sizes_ends_the_session(which: str) -> None:
    talk = Talk()
    statistics, flat = talk.send(), talk.versions_flat()
    sent = split(talk.table.published_layouts, flat)
    wrong = {
        "all float32": Sent(flat, NOTHING),  # a worker that does not know of wire_dtype
        "too few": Sent(sent.payload, sent.narrow[1:]),
        "too many": Sent(sent.payload, torch.cat([sent.narrow, sent.narrow])),
        "other dtypes": Sent(sent.payload, sent.narrow.bfloat16()),
    }[which]
    with pytest.raises(SessionLost, match="float32 and 20 float16 numbers"):
        talk.hear(of(statistics, wrong))
    assert [talk.depot.states(block)[-1].version for block in (0, 1)] == [0, 0]


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), "no basis"])
def test_a_version_that_is_no_preconditioner_is_refused_alone(fault: float | str) -> None:
    talk = Talk()
    statistics, flat = talk.send(), talk.versions_flat()
    U = talk.table.published_layouts[0].views(flat[: talk.table.published_layouts[0].size])["A.U"]
    if isinstance(fault, str):
        U[:, 1] = U[:, 0]
    else:
        U[0, 0] = fault
    talk.hear(of(statistics, split(talk.table.published_layouts, flat)))
    assert [talk.depot.states(block)[-1].version for block in (0, 1)] == [0, 1]
    assert talk.depot.counts.rejected == 1


def test_the_courier_rounds_and_the_training_thread_does_not() -> None:
    events = Events()
    table = BlockTable.make([narrow(block_spec("w0")), block_spec("w1")], (0,), 8)
    depot = filled_depot(table, events)
    links: list[ScriptedLink] = []

    def connect() -> ScriptedLink:
        links.append(ScriptedLink(answer, waits=True))
        return links[-1]

    job = job_info(table, heartbeat=0.05, link_timeout=600.0, emit=events)
    courier = Courier(connect, job, depot, "worker", events, "worker under test")
    courier.start()
    try:
        assert depot.wait(lambda: courier.up, DEADLINE)
        out = outgoing(table, [0, 1])
        out.payload.copy_(torch.linspace(0.1, 3.0, out.payload.numel()))
        assert courier.offer(out)
        assert depot.wait(lambda: depot.counts.sent == 1, DEADLINE)
    finally:
        courier.stop()
        assert courier.join(DEADLINE)
    (message,) = links[0].sent_of(Statistics)
    # What the training thread handed over is as it was.
    assert out.payload.dtype == torch.float32
    assert torch.equal(out.payload, torch.linspace(0.1, 3.0, out.payload.numel()))
    layouts = table.statistic_layouts
    got = join(layouts, Sent(message.payload, message.narrow))
    wanted = join(layouts, split(layouts, out.payload))
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))
    nbytes = sum(layout.nbytes for layout in layouts)
    assert [event["bytes"] for event in events.of("statistic_sent")] == [nbytes]
    assert depot.counts.bytes_out == nbytes == 4 * (out.payload.numel() + 4) - 2 * 20


# -- which blocks ---------------------------------------------------------------------------


def test_the_config_reaches_low_rank_blocks_alone() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Embedding(50, 30))
    for wire_dtype in ("float32", "float16"):
        blocks, _ = plan_blocks(model, KfacConfig(rank=4, wire_dtype=wire_dtype))
        told = {block.spec.name: (block.spec.kind, block.spec.wire_dtype) for block in blocks}
        assert told == {
            "0": ("lowrank", wire_dtype),
            "1": ("unitwise", "float32"),
            "2": ("lowrank", wire_dtype),
        }
    dense, _ = plan_blocks(model, KfacConfig(kind="dense", wire_dtype="float16"))
    assert {block.spec.wire_dtype for block in dense} == {"float32"}
    (matrix,) = find_matrices([("w", nn.Parameter(torch.ones(40, 30)))])
    assert matrix_spec(matrix, SoapConfig(rank=4, wire_dtype="float16")).wire_dtype == "float16"
    assert matrix_spec(matrix, SoapConfig(rank=4)).wire_dtype == "float32"


def test_it_is_one_setting_for_all_blocks() -> None:
    with pytest.raises(ConfigError, match="'wire_dtype', which is one for all blocks"):
        KfacConfig(overrides=[("0", {"wire_dtype": "float16"})])


def test_costs_know_of_it() -> None:
    wide = BlockSpec("w", "lowrank", (SideSpec(1024, 128), SideSpec(4096, 128)), 0.9)
    assert exchanged_bytes(narrow(wide)) == pytest.approx(exchanged_bytes(wide) / 2, rel=1e-2)
    assert worker_seconds([narrow(wide)]) < worker_seconds([wide])
    # In process nothing travels anywhere: what is computed with is float32 either way.
    assert inline_seconds([narrow(wide)]) == inline_seconds([wide])
