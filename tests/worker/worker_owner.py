"""An owner played by a test: one session over any link, and real statistics to send."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from worker_fakes import JOB, TABLE, hello

from distcurv.curvature.kinds import KINDS, Refreshed
from distcurv.curvature.spec import BlockSpec, SideSpec, Tensors
from distcurv.curvature.statistics import encode_rows
from distcurv.wire import connect
from distcurv.wire.messages import (
    Ack,
    Goodbye,
    Heartbeat,
    Message,
    Published,
    Seed,
    Statistics,
    Welcome,
)

DEADLINE_S = 120.0
Kind = TypeVar("Kind", bound=Message)

LOWRANK = BlockSpec(
    "lowrank", "lowrank", (SideSpec(13, 4), SideSpec(9, 3, tail="diagonal")), decay=0.9
)
DENSE = BlockSpec(
    "dense",
    "dense",
    (SideSpec(7, 7, encoding="dense"), SideSpec(5, 5, encoding="dense")),
    decay=0.9,
    damping=1e-2,
    relative_damping=True,
)
# An embedding's input side, a parameter on its own, and a normalisation layer.
EMBEDDING = BlockSpec(
    "embedding",
    "lowrank",
    (SideSpec(11, 0, "diagonal", "diagonal"), SideSpec(9, 3, tail="diagonal")),
    decay=0.9,
)
DIAGONAL = BlockSpec("scale", "diagonal", (SideSpec(8, 0, "diagonal", "diagonal"),), decay=0.9)
UNITWISE = BlockSpec("norm", "unitwise", (SideSpec(6, 0, "diagonal", "unit"),), decay=0.9)
# A convolution's weight, whose statistics are summed.
SHAMPOO = BlockSpec(
    "shampoo",
    "shampoo",
    tuple(SideSpec(dim, dim, "none", "dense") for dim in (6, 4, 3)),
    decay=1.0,
    damping=1e-2,
    power=1 / 6,
)
# Of small layers: matrices of per-sample gradients, and second moments in an eigenbasis.
FISHER = [
    BlockSpec(kind, kind, (SideSpec(6, 6, "none", "dense", units),), decay=0.9, damping=1e-2)
    for kind, units in (("layer_wise", 1), ("unit_rows", 3), ("full", 1))
]
KFE = BlockSpec(
    "kfe", "kfe", tuple(SideSpec(dim, dim, "none", "dense") for dim in (6, 4)), decay=0.9
)
EVERY_KIND = (LOWRANK, DENSE, EMBEDDING, DIAGONAL, UNITWISE, SHAMPOO, *FISHER, KFE)


def start_flat(spec: BlockSpec) -> Tensor:
    """Version 0 as it travels."""
    kind = KINDS[spec.kind]
    return kind.published_layout(spec).pack(kind.start(spec, seed=1))


def statistic_flat(spec: BlockSpec, basis_flat: Tensor, seed: int) -> Tensor:
    """The statistic of 40 random rows per side, against a basis."""
    kind = KINDS[spec.kind]
    generator = torch.Generator().manual_seed(seed)
    basis = kind.published_layout(spec).views(basis_flat)
    statistic = {"steps": torch.ones(())}
    for name, side in spec.named_sides():
        rows = torch.randn(40, side.dim, generator=generator)
        if side.encoding == "unit":
            biases = torch.randn(40, side.dim, generator=generator)
            encoded = {"ww": rows * rows, "wb": rows * biases, "bb": biases * biases}
            encoded = {key: products.sum(0) for key, products in encoded.items()}
        elif side.units > 1:
            draws = [torch.randn(40, side.dim, generator=generator) for _ in range(side.units)]
            parts = [encode_rows(side, own, None)["packed"] for own in draws]
            encoded = {"packed": torch.cat(parts)}
        else:
            encoded = encode_rows(side, rows, basis.get(f"{name}.U"))
        for key, value in encoded.items():
            statistic[f"{name}.{key}"] = value
        statistic[f"{name}.count"] = torch.tensor(40.0)
    if spec.kind == "kfe":
        statistic["S.squares"] = torch.rand(
            spec.sides[1].dim, spec.sides[0].dim, generator=generator
        )
    return kind.statistic_layout(spec).pack(statistic)


def batch(tensors: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([entry[name] for entry in tensors]) for name in tensors[0]}


def refresh_directly(
    spec: BlockSpec,
    states: Sequence[Tensors],
    statistics: Sequence[Tensor],
    bases: Sequence[Tensor],
) -> tuple[Refreshed, Tensor]:
    """What the kind itself makes of a batch, and that as it travels [B, size]."""
    kind = KINDS[spec.kind]
    refreshed = kind.refresh(
        spec,
        batch(states),
        batch([kind.statistic_layout(spec).views(flat) for flat in statistics]),
        batch([kind.published_layout(spec).views(flat) for flat in bases]),
    )
    return refreshed, kind.published_layout(spec).pack(refreshed.published)


class Owner:
    """Sends and receives with deadlines; heartbeats while it waits."""

    def __init__(self, endpoint: str, *, owner: int = 0, job: bytes = JOB) -> None:
        self.link = connect(endpoint)
        self.session = os.urandom(16)
        self.owner = owner
        self.job = job
        self._kept: list[Message] = []
        self._welcomed = False

    def close(self) -> None:
        self.link.send(Goodbye(self.session, "done"))
        self.link.close()

    def send(self, message: Message) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self.link.send(message):
            assert time.monotonic() < deadline, f"{type(message).__name__} cannot be sent"
            self._receive(0.01)

    def greet(self, specs: Sequence[BlockSpec]) -> None:
        self.send(
            hello(specs, session=self.session, owner=self.owner, job=self.job, table_hash=TABLE)
        )

    def open(self, specs: Sequence[BlockSpec]) -> Welcome:
        self.greet(specs)
        welcome = self.await_(Welcome)
        self._welcomed = True
        return welcome

    def seed(self, versions: Mapping[int, tuple[int, Tensor]]) -> None:
        """Seed {block: (version, flat)}."""
        numbers = [version for version, _ in versions.values()]
        payload = torch.cat([tensor for _, tensor in versions.values()])
        based_on = [-1] * len(numbers)
        self.send(Seed(self.session, list(versions), numbers, based_on, payload))

    def statistic(self, seq: int, entries: Mapping[int, tuple[int, Tensor]]) -> None:
        """Send {block: (basis, flat)}."""
        basis = [version for version, _ in entries.values()]
        payload = torch.cat([tensor for _, tensor in entries.values()])
        self.send(Statistics(self.session, seq, seq, seq, list(entries), basis, payload))

    def acknowledge(self, published: Published) -> None:
        self.send(Ack(self.session, "published", published.blocks, published.versions))

    def await_(self, kind: type[Kind], where: Callable[[Kind], bool] = lambda _: True) -> Kind:
        """The next message of a kind; others are kept for later."""
        for index, message in enumerate(self._kept):
            if isinstance(message, kind) and where(message):
                del self._kept[index]
                return message
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if self._welcomed:
                self.link.send(Heartbeat(self.session, 0.0, 0))
            message = self._receive(0.1)
            if isinstance(message, kind) and where(message):
                self._kept.pop()
                return message
        raise AssertionError(f"no {kind.__name__} came; these did: {self._kept}")

    def _receive(self, timeout: float) -> Message | None:
        message = self.link.receive(timeout)
        if message is not None and not isinstance(message, Heartbeat):
            self._kept.append(message)
        return message


class Events:
    """An emit that other threads call and a test waits on."""

    def __init__(self) -> None:
        self._all: list[tuple[str, dict[str, object]]] = []
        self._changed = threading.Condition()

    def __call__(self, kind: str, **fields: object) -> None:
        with self._changed:
            self._all.append((kind, fields))
            self._changed.notify_all()

    def seen(self, kind: str, **expected: object) -> dict[str, object] | None:
        """The fields of the first such event, if there was one."""
        with self._changed:
            return next(
                (
                    fields
                    for other, fields in self._all
                    if other == kind and expected.items() <= fields.items()
                ),
                None,
            )

    def await_(self, kind: str, **expected: object) -> dict[str, object]:
        """The fields of the first such event, once there is one."""
        with self._changed:
            event = self._changed.wait_for(lambda: self.seen(kind, **expected), DEADLINE_S)
        assert event is not None, f"no event {kind} {expected}; these were: {self._all}"
        return event
