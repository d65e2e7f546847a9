"""Blocks that travel as float16, on the worker: what it keeps is what its owner has.

The oracle is `refresh_directly` (the kind itself), rounded and put right as the functions of
`distcurv.curvature.narrow` do it, which have tests of their own.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from worker_fakes import A, B, Script, beats, hello
from worker_owner import LOWRANK, refresh_directly, start_flat, statistic_flat

from distcurv.curvature.kinds import KINDS
from distcurv.curvature.narrow import Sent, as_received, join, split
from distcurv.curvature.spec import BlockSpec
from distcurv.errors import NumericsError
from distcurv.train.table import BlockTable
from distcurv.wire.messages import Ack, Error, Published, Seed, Statistics
from distcurv.worker import compute
from distcurv.worker.compute import Computer
from distcurv.worker.jobs import Failed, Folded, Item, Job
from distcurv.worker.settings import WorkerSettings
from distcurv.worker.table import claimed_bytes

SPEC = dataclasses.replace(LOWRANK, wire_dtype="float16")
STATISTIC = KINDS["lowrank"].statistic_layout(SPEC)
PUBLISHED = KINDS["lowrank"].published_layout(SPEC)


def item(seed: int = 0, newest: Tensor | None = None) -> Item:
    newest = start_flat(SPEC) if newest is None else newest
    (statistic,) = join([STATISTIC], split([STATISTIC], statistic_flat(SPEC, newest, seed)))
    return Item(seed, f"b{seed}", None, newest, newest, statistic)


def folded(spec: BlockSpec, *items: Item) -> list[Folded]:
    results = Computer("cpu").run(Job(0, 0, spec, items)).results
    assert all(isinstance(result, Folded) for result in results), results
    return [result for result in results if isinstance(result, Folded)]


def test_what_is_kept_is_what_the_owner_has_of_what_was_sent() -> None:
    items = [item(seed) for seed in range(3)]
    states = [PUBLISHED.views(one.newest) for one in items]
    _, exact = refresh_directly(
        SPEC, states, [one.statistic for one in items], [one.basis for one in items]
    )
    for index, result in enumerate(folded(SPEC, *items)):
        sent = split([PUBLISHED], exact[index])
        assert torch.equal(result.sent.payload, sent.payload)
        assert torch.equal(result.sent.narrow, sent.narrow)
        assert torch.equal(result.published, as_received(PUBLISHED, sent))
        assert not torch.equal(result.published, exact[index])
        # The state is that of a worker that was seeded with this version.
        seeded = PUBLISHED.views(result.published)
        assert all(torch.equal(value, seeded[name]) for name, value in result.state.items())


def test_a_state_goes_on_as_after_a_seed() -> None:
    (first,) = folded(SPEC, item())
    second = item(1, first.published)
    (kept,) = folded(SPEC, dataclasses.replace(second, state=first.state))
    (seeded,) = folded(SPEC, second)
    assert torch.equal(kept.published, seeded.published)
    assert torch.equal(kept.sent.narrow, seeded.sent.narrow)


def test_in_float32_what_is_sent_is_what_is_kept() -> None:
    spec = dataclasses.replace(SPEC, wire_dtype="float32")
    (result,) = folded(spec, item())
    assert result.sent.payload is result.published
    assert result.sent.narrow.numel() == 0


def test_a_basis_that_cannot_be_put_right_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layout: object, sent: Sent) -> Tensor:
        return as_received(PUBLISHED, sent).fill_(float("nan"))

    monkeypatch.setattr(compute, "as_received", broken)
    (result,) = Computer("cpu").run(Job(0, 0, SPEC, (item(),))).results
    assert isinstance(result, Failed) and "non-finite" in result.text


# -- the service ----------------------------------------------------------------------------


def opened(script: Script) -> bytes:
    """A session with one narrow block, seeded with version 0."""
    session = script.open(A, [SPEC])
    assert script.say(A, Seed(session, [0], [0], [-1], start_flat(SPEC))) == []
    return session


def statistics(session: bytes, sent: Sent, seq: int = 0) -> Statistics:
    return Statistics(session, seq, 0, 1, [0], [0], sent.payload, sent.narrow)


def test_a_version_is_sent_and_resent_in_two_tensors(script: Script) -> None:
    session = opened(script)
    sent = split([STATISTIC], statistic_flat(SPEC, start_flat(SPEC), 0))
    assert script.say(A, statistics(session, sent)) == []
    replies = [message for _, message in script.compute()]
    assert [type(message) for message in replies] == [Ack, Published]
    published = replies[1]
    assert isinstance(published, Published)
    (expected,) = folded(SPEC, item())
    assert torch.equal(published.payload, expected.sent.payload)
    assert torch.equal(published.narrow, expected.sent.narrow)
    assert published.narrow.dtype == torch.float16
    beats(script, 0.0)
    (resent,) = [m for m in beats(script, 1.0) if isinstance(m, Published)]
    assert torch.equal(resent.payload, published.payload)
    assert torch.equal(resent.narrow, published.narrow)


@pytest.mark.parametrize("which", ["float32 for float16", "too few", "too many", "nothing"])
def test_a_statistic_of_other_sizes_is_refused_by_name(script: Script, which: str) -> None:
    session = opened(script)
    flat = statistic_flat(SPEC, start_flat(SPEC), 0)
    sent = split([STATISTIC], flat)
    wrong = {
        # An owner with wire_dtype="float32".
        "float32 for float16": Sent(flat, sent.narrow[:0]),
        "too few": Sent(sent.payload, sent.narrow[:-1]),
        "too many": Sent(sent.payload, torch.cat([sent.narrow, sent.narrow[:1]])),
        "nothing": Sent(sent.payload[:0], sent.narrow[:0]),
    }[which]
    (reply,) = script.say(A, statistics(session, wrong))
    assert isinstance(reply, Error)
    assert (reply.code, reply.blocks, reply.seq) == ("bad_statistic", [0], 0)
    assert "is wire_dtype the same on both sides?" in reply.text
    assert script.say(A, statistics(session, sent, seq=1)) == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["A.Y", "A.count"])
def test_a_statistic_that_is_not_finite_is_refused(
    script: Script, poison: float, place: str
) -> None:
    session = opened(script)
    flat = statistic_flat(SPEC, start_flat(SPEC), 0)
    STATISTIC.views(flat)[place].view(-1)[0] = poison
    (reply,) = script.say(A, statistics(session, split([STATISTIC], flat)))
    assert isinstance(reply, Error) and reply.code == "non_finite"


def test_finite_numbers_whose_products_are_not_are_refused(script: Script) -> None:
    session = opened(script)
    payload, narrow = split([STATISTIC], statistic_flat(SPEC, start_flat(SPEC), 0))
    sent = Sent(payload.clone().fill_(1e38), narrow.clone().fill_(6e4))
    (reply,) = script.say(A, statistics(session, sent))
    assert isinstance(reply, Error) and reply.code == "non_finite"


def test_what_is_sent_counts_as_memory() -> None:
    settings = WorkerSettings()
    wide = claimed_bytes([dataclasses.replace(SPEC, wire_dtype="float32")], settings)
    assert claimed_bytes([SPEC], settings) == wide + PUBLISHED.nbytes


def test_the_batch_is_tried_singly_where_one_block_fails() -> None:
    good, bad = item(0), item(1)
    bad = dataclasses.replace(bad, statistic=bad.statistic.clone())
    STATISTIC.views(bad.statistic)["A.Y"].neg_()
    first, second = Computer("cpu").run(Job(0, 0, SPEC, (good, bad))).results
    assert isinstance(first, Folded) and torch.equal(
        first.published, folded(SPEC, good)[0].published
    )
    assert isinstance(second, Failed) and NumericsError.__name__ in second.text


def test_owners_of_one_job_must_agree(script: Script) -> None:
    """The setting is in the table's hash; what differs there is refused before anything is sent."""
    wide = dataclasses.replace(SPEC, wire_dtype="float32")
    digests = [BlockTable.make([spec], (0,), 8).digest for spec in (SPEC, wide)]
    script.open(A, [SPEC], table_hash=digests[0])
    other = hello([wide], session=b"b" * 16, owner=1, table_hash=digests[1])
    (reply,) = script.say(B, other)
    assert isinstance(reply, Error) and reply.code == "table_mismatch"
    assert "all ranks must build the same model and settings" in reply.text
