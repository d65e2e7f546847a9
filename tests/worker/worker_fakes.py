"""A kind whose arithmetic is exact in float32, and a script runner for the sans-I/O service."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.curvature.kinds import Refreshed
from distcurv.curvature.spec import BlockSpec, Layout, SideSpec, Tensors
from distcurv.errors import NumericsError, ProtocolError
from distcurv.wire.messages import PROTOCOL, Error, Hello, Message, Seed, Statistics
from distcurv.worker.compute import Computer
from distcurv.worker.jobs import Job
from distcurv.worker.service import Service
from distcurv.worker.settings import WorkerSettings

FAILS = 666.0  # in the first place of a statistic: the refresh raises NumericsError
INFINITE = 777.0  # the refresh publishes an infinite number
JOB = b"j" * 16
OTHER_JOB = b"o" * 16
TABLE = b"t" * 32


class FakeKind:
    """U' = U + Y + 10 * basis; the innovation is the statistic's last number."""

    name = "fake"

    def statistic_layout(self, spec: BlockSpec) -> Layout:
        return Layout({"Y": (spec.sides[0].dim,), "steps": ()})

    def published_layout(self, spec: BlockSpec) -> Layout:
        return Layout({"U": (spec.sides[0].dim,), "weight": ()})

    def seed(self, spec: BlockSpec, published: Tensors) -> Tensors:
        return {name: value.clone() for name, value in published.items()}

    def refresh(
        self, spec: BlockSpec, state: Tensors, statistic: Tensors, basis: Tensors
    ) -> Refreshed:
        Y = statistic["Y"]
        if bool((Y[:, 0] == FAILS).any()):
            raise NumericsError("asked to fail")
        new = {
            "U": state["U"] + Y + 10 * basis["U"],
            "weight": state["weight"] + statistic["steps"],
        }
        published = {name: value.clone() for name, value in new.items()}
        published["U"][Y[:, 0] == INFINITE] = torch.inf
        return Refreshed(new, published, torch.full((len(Y),), 0.25), Y[:, -1].clone())


def fake_spec(name: str, dim: int = 3) -> BlockSpec:
    return BlockSpec(name=name, kind="fake", sides=(SideSpec(dim, 1),), decay=0.5)


def hello(
    specs: Sequence[BlockSpec],
    *,
    session: bytes,
    owner: int = 0,
    job: bytes = JOB,
    generation: int = 0,
    table_hash: bytes = TABLE,
    protocol: int = PROTOCOL,
) -> Hello:
    fields = [spec.to_fields() for spec in specs]
    return Hello(protocol, job, session, generation, owner, table_hash, fields)


def flat(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


class Script:
    """A service, a clock that the test moves, and everything it said."""

    def __init__(self, settings: WorkerSettings | None = None) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.service = Service(settings or WorkerSettings(), self._emit, pid=4711)
        self.computer = Computer("cpu")
        self.now = 100.0

    def _emit(self, kind: str, **fields: object) -> None:
        self.events.append((kind, fields))

    def kinds_of_events(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def say(self, peer: bytes, content: Message | ProtocolError) -> list[Message]:
        """What that peer is answered; nobody else may be told anything."""
        out = self.service.on_message(peer, content, self.now, nbytes=1)
        assert all(to == peer for to, _ in out)
        return [message for _, message in out]

    def open(self, peer: bytes, specs: Sequence[BlockSpec], **fields: object) -> bytes:
        """Open a session called after the peer; returns its id."""
        session = bytes(fields.pop("session", peer.ljust(16, b".")))  # type: ignore[arg-type]
        (welcome,) = self.say(peer, hello(specs, session=session, **fields))  # type: ignore[arg-type]
        assert type(welcome).__name__ == "Welcome", welcome
        return session

    def seed(self, peer: bytes, session: bytes, block: int, version: int, u: Tensor) -> None:
        """Seed one fake block with U = u and weight 0."""
        payload = torch.cat([u, torch.zeros(1)])
        assert self.say(peer, Seed(session, [block], [version], [-1], payload)) == []

    def statistic(
        self, peer: bytes, session: bytes, seq: int, entries: dict[int, tuple[int, Tensor]]
    ) -> list[Message]:
        """Send statistics {block: (basis, Y)} of fake blocks over steps seq..seq+1."""
        parts = [torch.cat([y, torch.ones(1)]) for _, y in entries.values()]
        basis = [version for version, _ in entries.values()]
        payload = torch.cat(parts)
        message = Statistics(session, seq, seq, seq + 1, list(entries), basis, payload)
        return self.say(peer, message)

    def compute(self) -> list[tuple[bytes, Message]]:
        """Run the next job, if there is one, and hand its outcome back."""
        job = self.service.next_job(self.now)
        return [] if job is None else self.finish(job)

    def finish(self, job: Job) -> list[tuple[bytes, Message]]:
        return self.service.on_result(job, self.computer.run(job), self.now)


A, B, C = b"A", b"B", b"C"  # peers
SID = b"s" * 16
Y = flat(1, 2, 0.5)
SPECS = [fake_spec("one"), fake_spec("two")]


def codes(messages: list[Message]) -> list[str]:
    return [message.code if isinstance(message, Error) else "-" for message in messages]


def seeded(script: Script, peer: bytes = A, **fields: object) -> bytes:
    session = script.open(peer, SPECS, **fields)
    script.seed(peer, session, 0, 3, flat(1, 1, 1))
    script.seed(peer, session, 1, 3, flat(2, 2, 2))
    return session


def beats(script: Script, seconds: float) -> list[Message]:
    script.now += seconds
    return [message for _, message in script.service.on_tick(script.now)]
