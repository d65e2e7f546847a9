"""Builds what a worker sends; the one place that knows how results become messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from distcurv.errors import ProtocolError
from distcurv.wire.messages import Error, Message, Published
from distcurv.worker.store import Release

Outgoing = list[tuple[bytes, Message]]
Emit = Callable[..., None]

TEXT_LIMIT = 1000  # characters of an error's text: a message for people, not a transport


def error_message(
    session: bytes, refusal: ProtocolError, blocks: Sequence[int] = (), seq: int = -1
) -> Error:
    """A refusal as a message; ``blocks`` and ``seq`` name the statistics that were refused."""
    return Error(session, refusal.code, refusal.text[:TEXT_LIMIT], list(blocks), seq)


def published_message(session: bytes, releases: Sequence[tuple[int, Release]]) -> Published:
    """One message with the versions of several blocks; its tensors are memory of their own."""
    sent = [release.sent for _, release in releases]
    return Published(
        session=session,
        blocks=[block for block, _ in releases],
        versions=[release.version for _, release in releases],
        based_on=[release.based_on for _, release in releases],
        seqs=[release.seq for _, release in releases],
        uncaptured=[release.uncaptured for _, release in releases],
        innovation=[release.innovation for _, release in releases],
        seconds=sum(release.seconds for _, release in releases),
        payload=torch.cat([one.payload for one in sent]),
        narrow=torch.cat([one.narrow for one in sent]),
    )


def published_messages(
    session: bytes, releases: Sequence[tuple[int, Release]], limit: int
) -> Iterator[Published]:
    """The same in messages of at most ``limit`` bytes of payload (a larger block goes alone)."""
    part: list[tuple[int, Release]] = []
    size = 0
    for block, release in releases:
        nbytes = release.sent.nbytes
        if part and size + nbytes > limit:
            yield published_message(session, part)
            part, size = [], 0
        part.append((block, release))
        size += nbytes
    if part:
        yield published_message(session, part)
