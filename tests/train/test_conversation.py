"""One session, told by a scripted worker: opening, seeds, refusals, lies and silence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from train_rig import (
    Events,
    HonestWorker,
    ScriptedLink,
    filled_depot,
    job_info,
    make_table,
    outgoing,
    published,
)

from distcurv.curvature.narrow import Sent
from distcurv.errors import ProtocolError
from distcurv.train.conversation import Conversation, Parcel, SessionLost
from distcurv.train.depot import InFlight
from distcurv.wire.messages import (
    NOTHING,
    PROTOCOL,
    Ack,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Seed,
    Statistics,
    Welcome,
)


class Talk:
    """An open session with a scripted worker and one statistic of blocks 0 and 1 in flight."""

    def __init__(self, *, route: str = "worker", opened: bool = True) -> None:
        self.events = Events()
        self.table = make_table(3)
        self.depot = filled_depot(self.table, self.events)
        self.worker = HonestWorker(self.table)
        self.worker.speaks = False
        self.link = ScriptedLink(self.worker if opened else lambda message: ())
        job = job_info(self.table, emit=self.events)
        self.conversation = Conversation(self.link, job, self.depot, route)
        self.now = 100.0
        if opened:
            self.pump()
            assert self.conversation.open

    def pump(self, after: float = 0.0) -> None:
        self.now += after
        self.conversation.pump(self.now)

    def parcel(self, seq: int, blocks: list[int]) -> Parcel:
        out = outgoing(self.table, blocks)
        self.depot.depart(blocks, InFlight(self.conversation.session, seq, *out.span))
        seeds = {block: self.depot.states(block) for block in blocks}
        return Parcel(seq, out, seeds, Sent(out.payload, NOTHING), fetched=True)

    def send(self, seq: int = 0, blocks: tuple[int, ...] = (0, 1)) -> Statistics:
        assert self.conversation.send_statistics(self.parcel(seq, list(blocks)))
        return self.link.sent_of(Statistics)[-1]

    def hear(self, *messages: Message | Exception) -> None:
        self.link.say(*messages)
        for _ in messages:
            self.pump()

    def acked(self) -> list[Ack]:
        self.pump()  # acknowledgements leave with the next turn
        return self.link.sent_of(Ack)

    def payload(self, blocks: int, value: float = 1.0) -> torch.Tensor:
        return torch.full((self.table.published_layouts[0].size * blocks,), value)

    def versions(self) -> list[int]:
        return [self.depot.states(b)[-1].version for b in range(3)]


# -- opening ------------------------------------------------------------------------------


def test_the_first_message_is_a_hello_with_the_whole_story() -> None:
    talk = Talk(opened=False)
    talk.pump()
    (hello,) = talk.link.sent
    assert isinstance(hello, Hello)
    assert (hello.protocol, hello.job, hello.owner) == (PROTOCOL, b"j" * 16, 0)
    assert hello.session == talk.conversation.session
    assert len(hello.session) == 16
    assert hello.table_hash == talk.table.digest
    assert hello.blocks == [spec.to_fields() for spec in talk.table.specs]


def test_nothing_but_hello_is_said_until_the_welcome() -> None:
    talk = Talk(opened=False)
    for _ in range(3):
        talk.pump(after=1.5)
    assert [type(m) for m in talk.link.sent] == [Hello]
    assert not talk.conversation.open
    talk.hear(Welcome(talk.conversation.session, 1, "cpu"))
    assert talk.conversation.open


def test_a_link_that_is_not_there_yet_gets_hello_again() -> None:
    talk = Talk(opened=False)
    talk.link.takes = False
    talk.pump()
    talk.link.takes = True
    talk.pump()
    talk.pump()
    assert [type(m) for m in talk.link.sent] == [Hello]


def test_a_welcome_of_another_session_opens_nothing() -> None:
    talk = Talk(opened=False)
    talk.pump()
    talk.hear(Welcome(b"x" * 16, 1, "cpu"))
    assert not talk.conversation.open


def test_sessions_have_names_of_their_own() -> None:
    assert Talk().conversation.session != Talk().conversation.session


# -- seeds --------------------------------------------------------------------------------


def test_blocks_are_seeded_right_before_their_first_statistic() -> None:
    talk = Talk()
    assert talk.link.sent_of(Seed) == []
    talk.send(0, (0, 1))
    talk.send(1, (1, 2))
    kinds = [type(m) for m in talk.link.sent if isinstance(m, Seed | Statistics)]
    assert kinds == [Seed, Statistics, Seed, Statistics]
    assert [m.blocks for m in talk.link.sent_of(Seed)] == [[0, 1], [2]]
    assert [m.seq for m in talk.link.sent_of(Statistics)] == [0, 1]


def test_a_seed_holds_all_versions_oldest_first() -> None:
    talk = Talk()
    size = talk.table.published_layouts[1].size
    talk.depot.depart([1], InFlight(b"earlier", 0, 3, 7, 1))
    assert talk.depot.accept(1, b"earlier", 0, 1, torch.full((size,), 9.0), "inline")
    talk.send(0, (0, 1))
    (seed,) = talk.link.sent_of(Seed)
    assert (seed.blocks, seed.versions, seed.based_on) == ([0, 1, 1], [0, 0, 1], [-1, -1, 7])
    assert [part[0].item() for part in seed.payload.split(size)] == [0.0, 1.0, 9.0]


def test_large_seeds_travel_in_parts_that_keep_a_block_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = Talk()
    size = talk.table.published_layouts[0].size
    talk.depot.depart([0], InFlight(b"earlier", 0, 3, 7, 1))
    assert talk.depot.accept(0, b"earlier", 0, 1, torch.ones(size), "inline")
    monkeypatch.setattr("distcurv.train.conversation._SEED_CHUNK", 4 * size)
    talk.send(0, (0, 1, 2))
    assert [m.blocks for m in talk.link.sent_of(Seed)] == [[0, 0], [1], [2]]


def test_after_another_route_has_served_a_block_it_is_seeded_anew() -> None:
    talk = Talk()
    talk.send(0, (0, 1))
    talk.conversation.forget_seeds([1, 2])
    talk.send(1, (0, 1))
    assert [m.blocks for m in talk.link.sent_of(Seed)] == [[0, 1], [1]]


def test_a_full_link_is_tried_again_without_seeding_twice() -> None:
    talk = Talk()
    parcel = talk.parcel(0, [0, 1])
    talk.link.takes = False
    assert not talk.conversation.send_statistics(parcel)
    talk.link.takes = True
    assert talk.conversation.send_statistics(parcel)
    kinds = [type(m) for m in talk.link.sent if isinstance(m, Seed | Statistics)]
    assert kinds == [Seed, Statistics]


def test_blocks_are_named_by_their_place_in_the_session() -> None:
    table = make_table(3)
    depot = filled_depot(table)
    link = ScriptedLink(HonestWorker(table))
    conversation = Conversation(link, job_info(table, [2, 1]), depot, "worker")
    conversation.pump(0.0)
    out = outgoing(table, [1])
    depot.depart([1], InFlight(conversation.session, 0, *out.span))
    sent = Sent(out.payload, NOTHING)
    assert conversation.send_statistics(Parcel(0, out, {1: depot.states(1)}, sent, True))
    assert link.sent_of(Statistics)[0].blocks == [1]
    for _ in range(2):
        conversation.pump(0.0)
    assert [depot.states(b)[-1].version for b in range(3)] == [0, 1, 0]


# -- results ------------------------------------------------------------------------------


def test_a_version_is_taken_acknowledged_and_reported() -> None:
    talk = Talk()
    sent = talk.send()
    talk.hear(published(sent, [1, 1], talk.payload(2)))
    assert talk.versions() == [1, 1, 0]
    state = talk.depot.states(0)[-1]
    assert (state.since, state.through, state.route) == (0, 4, "worker")
    assert talk.acked() == [Ack(talk.conversation.session, "published", [0, 1], [1, 1])]
    assert talk.depot.counts.folded == 4
    assert talk.depot.counts.bytes_in == 4 * talk.payload(2).numel()
    assert [e["blocks"] for e in talk.events.of("published_received")] == [[0, 1]]


def test_what_was_taken_does_not_share_memory_with_the_message() -> None:
    talk = Talk()
    payload = talk.payload(2)
    talk.hear(published(talk.send(), [1, 1], payload))
    payload.fill_(float("nan"))
    assert talk.depot.states(0)[-1].flat.isfinite().all()


def test_a_repeat_is_acknowledged_again_and_changes_nothing() -> None:
    talk = Talk()
    answer = published(talk.send(), [1, 1], talk.payload(2))
    talk.hear(answer, answer)
    assert talk.versions() == [1, 1, 0]
    assert len(talk.acked()) == 2
    assert talk.depot.counts.folded == 4
    assert talk.depot.counts.rejected == 0


def test_acknowledgements_wait_while_the_link_is_full() -> None:
    talk = Talk()
    answer = published(talk.send(), [1, 1], talk.payload(2))
    talk.link.takes = False
    talk.hear(answer)
    assert talk.acked() == []
    talk.link.takes = True
    assert len(talk.acked()) == 1


def test_bytes_of_the_in_process_service_are_not_counted_as_traffic() -> None:
    talk = Talk(route="inline")
    talk.hear(published(talk.send(), [1, 1], talk.payload(2)))
    assert (talk.depot.counts.bytes_in, talk.depot.counts.inline) == (0, 2)


def test_how_busy_the_worker_is() -> None:
    talk = Talk()
    talk.hear(Heartbeat(talk.conversation.session, 0.75, 3))
    assert talk.conversation.busy == 0.75


# -- lies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_payload_of_the_wrong_size_ends_the_session(size: int) -> None:
    talk = Talk()
    wrong = torch.ones(talk.payload(2).numel() + size) if size else torch.ones(0)
    with pytest.raises(SessionLost, match=r"a preconditioner of \d+ torch.float32 and 0 "):
        talk.hear(published(talk.send(), [1, 1], wrong))
    assert talk.versions() == [0, 0, 0]


def test_a_payload_of_another_dtype_ends_the_session() -> None:
    talk = Talk()
    with pytest.raises(SessionLost, match="float64"):
        talk.hear(published(talk.send(), [1, 1], talk.payload(2).double()))
    assert talk.versions() == [0, 0, 0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_version_that_is_not_finite_is_refused_alone(poison: float) -> None:
    talk = Talk()
    payload = talk.payload(2)
    payload[0] = poison
    talk.hear(published(talk.send(), [1, 1], payload))
    assert talk.versions() == [0, 1, 0]
    assert (talk.depot.counts.rejected, talk.depot.counts.dropped) == (1, 2)
    assert len(talk.acked()) == 1  # or it would be resent for ever
    talk.send(1, (0, 1))
    assert talk.link.sent_of(Seed)[-1].blocks == [0]


@pytest.mark.parametrize("version", [0, 2, 7, -1])
def test_a_version_that_is_not_the_next_is_refused_and_the_block_seeded_anew(version: int) -> None:
    talk = Talk()
    talk.hear(published(talk.send(), [version, 1], talk.payload(2)))
    assert talk.versions() == [0, 1, 0]
    assert (talk.depot.counts.rejected, talk.depot.counts.dropped) == (1, 2)
    assert talk.depot.in_flight_steps() == 0
    talk.send(1, (0, 1))
    assert talk.link.sent_of(Seed)[-1].blocks == [0]


def test_a_late_answer_to_an_earlier_statistic_is_refused_and_ours_stays_in_flight() -> None:
    talk = Talk()
    early = published(talk.send(0), [1, 1], talk.payload(2))
    talk.hear(early)
    answer = published(talk.send(1), [2, 2], talk.payload(2, 5.0))
    talk.hear(dataclasses.replace(answer, seqs=[0, 0]))
    assert talk.versions() == [1, 1, 0]
    assert talk.depot.in_flight_steps() == 4
    talk.hear(answer)
    assert talk.versions() == [2, 2, 0]


def test_an_answer_to_a_statistic_that_was_never_sent_ends_the_session() -> None:
    talk = Talk()
    answer = published(talk.send(), [1, 1], talk.payload(2))
    with pytest.raises(SessionLost, match="answered statistic 3, sent were 0"):
        talk.hear(dataclasses.replace(answer, seqs=[3, 3]))
    assert talk.versions() == [0, 0, 0]


def test_a_version_of_another_session_is_ignored() -> None:
    talk = Talk()
    talk.hear(published(talk.send(), [1, 1], talk.payload(2), session=b"x" * 16))
    assert talk.versions() == [0, 0, 0]
    assert talk.acked() == []
    assert talk.depot.in_flight_steps() == 4


@pytest.mark.parametrize("block", [3, -1])
def test_a_block_that_does_not_exist_ends_the_session(block: int) -> None:
    talk = Talk()
    answer = published(talk.send(), [1, 1], talk.payload(2))
    with pytest.raises(SessionLost, match=r"named blocks \[0, -?\d\] of 3"):
        talk.hear(dataclasses.replace(answer, blocks=[0, block]))


def test_one_version_said_twice_in_a_message_is_taken_once() -> None:
    talk = Talk()
    answer = published(talk.send(), [1, 1], talk.payload(2))
    talk.hear(dataclasses.replace(answer, blocks=[0, 0]))
    assert talk.versions() == [1, 0, 0]


def test_messages_that_only_owners_send_end_the_session() -> None:
    talk = Talk()
    sent = talk.send()
    with pytest.raises(SessionLost, match="Statistics, which only owners send"):
        talk.hear(sent)


def test_bytes_that_are_no_message_leave_through_the_error_of_the_link() -> None:
    talk = Talk()
    with pytest.raises(ProtocolError, match="truncated"):
        talk.hear(ProtocolError("truncated", "half a message"))


# -- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reseeds"),
    [
        ("unknown_basis", True),
        ("non_finite", False),
        ("refresh_failed", False),
        ("overrun", False),
        ("bad_statistic", False),
    ],
)
def test_a_refused_statistic_is_counted_as_dropped(code: str, reseeds: bool) -> None:
    talk = Talk()
    talk.send()
    talk.hear(Error(talk.conversation.session, code, "no", [1], 0))
    assert talk.depot.counts.dropped == 2
    assert talk.depot.counts.refresh_failures == 1
    assert talk.events.of("dropped") == [{"blocks": [1], "steps": 2, "reason": code}]
    assert talk.depot.in_flight(0) is not None
    assert talk.depot.in_flight(1) is None
    talk.send(1, (1,))
    assert len(talk.link.sent_of(Seed)) == 1 + reseeds


def test_a_refusal_of_another_statistic_drops_nothing() -> None:
    talk = Talk()
    talk.send()
    talk.hear(Error(talk.conversation.session, "non_finite", "no", [0, 1], 9))
    assert talk.depot.in_flight_steps() == 4


@pytest.mark.parametrize("code", ["busy", "old_generation", "no_session", "anything"])
def test_other_refusals_end_the_session(code: str) -> None:
    talk = Talk()
    with pytest.raises(SessionLost, match=f"worker refused: {code}: go away"):
        talk.hear(Error(talk.conversation.session, code, "go away"))


def test_an_error_without_a_session_is_meant_for_us() -> None:
    talk = Talk()
    with pytest.raises(SessionLost, match="malformed"):
        talk.hear(Error(b"", "malformed", "unreadable"))


def test_a_goodbye_ends_the_session() -> None:
    talk = Talk()
    with pytest.raises(SessionLost, match="goodbye: draining"):
        talk.hear(Goodbye(talk.conversation.session, "draining"))


# -- signs of life ------------------------------------------------------------------------


def test_a_heartbeat_leaves_once_per_period() -> None:
    talk = Talk()
    for _ in range(10):
        talk.hear(Heartbeat(talk.conversation.session, 0.0, 0))
        talk.pump(after=0.5)
    assert 4 <= len(talk.link.sent_of(Heartbeat)) <= 5


def test_words_that_waited_while_the_process_was_held_up_count() -> None:
    talk = Talk()
    talk.link.say(Heartbeat(talk.conversation.session, 0.5, 0))
    talk.pump(after=60.0)
    assert talk.conversation.open and talk.conversation.busy == 0.5
    talk.pump(after=4.9)
    with pytest.raises(SessionLost, match="nothing heard"):
        talk.pump(after=0.2)


def test_silence_ends_the_session() -> None:
    talk = Talk()
    talk.pump(after=4.9)
    with pytest.raises(SessionLost, match=r"nothing heard for 5 s$"):
        talk.pump(after=0.2)


def test_a_worker_that_never_answers_ends_the_session() -> None:
    talk = Talk(opened=False)
    talk.pump()
    with pytest.raises(SessionLost, match="no worker answered"):
        talk.pump(after=5.1)


def test_any_word_breaks_the_silence() -> None:
    talk = Talk()
    for _ in range(4):
        talk.pump(after=4.0)
        talk.hear(Heartbeat(talk.conversation.session, 0.0, 0))
        assert talk.conversation.open


def test_goodbye_is_said_only_where_a_session_is_open() -> None:
    talk = Talk()
    talk.conversation.goodbye()
    assert isinstance(talk.link.sent[-1], Goodbye)
    unheard = Talk(opened=False)
    unheard.conversation.goodbye()
    assert unheard.link.sent == []
