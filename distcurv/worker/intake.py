"""Takes an owner's seeds, statistics and acknowledgements in, after checking every claim.

A statistic that is refused is always named (blocks and seq), because the owner keeps one in
flight per block until it hears of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distcurv.curvature.narrow import Sent, join, sent_sizes
from distcurv.curvature.spec import Layout
from distcurv.errors import ProtocolError
from distcurv.wire.messages import Ack, Error, Seed, Statistics
from distcurv.worker.replies import error_message
from distcurv.worker.sessions import Session

_WHY = {
    "unknown_basis": "the basis version of the statistic is not held here: seed the block again",
    "overrun": "too many statistics of the block wait already: send one at a time",
    "non_finite": "the statistic has infinite or undefined numbers",
}


def check_statistics(session: Session, message: Statistics) -> list[Tensor]:
    """One flat float32 tensor per block, a view of the payload where nothing of the message is
    narrow; raises `ProtocolError` ``bad_statistic``."""
    code = "bad_statistic"
    _check_blocks(session, message.blocks, code, unique=True)
    _check_lengths(code, message.blocks, message.basis)
    if message.seq <= session.last_seq:
        raise ProtocolError(
            code, f"seq {message.seq} does not follow {session.last_seq} in this session"
        )
    if message.since > message.through:
        raise ProtocolError(code, f"steps {message.since} to {message.through} are no range")
    layouts = [session.store.blocks[block].statistic_layout for block in message.blocks]
    return _join(Sent(message.payload, message.narrow), layouts, code)


def queue_statistics(
    session: Session, message: Statistics, parts: Sequence[Tensor], now: float
) -> list[Error]:
    """Queue what can be folded; one `Error` per reason names what cannot."""
    session.last_seq = message.seq
    # Of what is narrow only the products with the scales count: they are looked at block by block.
    finite = not message.narrow.numel() and bool(torch.isfinite(message.payload).all())
    refused: dict[str, list[int]] = defaultdict(list)
    for block, basis, part in zip(message.blocks, message.basis, parts, strict=True):
        code = session.store.refusal(block, basis)
        if code is None and not finite and not bool(torch.isfinite(part).all()):
            code = "non_finite"
        if code is None:
            session.store.enqueue(block, basis, message.seq, message.through, now, part)
        else:
            refused[code].append(block)
    errors = []
    for code, which in refused.items():
        text = f"{_WHY[code]} ({', '.join(session.store.names(which)[:5])})"
        errors.append(error_message(session.id, ProtocolError(code, text), which, message.seq))
    return errors


def take_seed(session: Session, message: Seed) -> None:
    """Start blocks anew from full states; all versions of a block come in one message.

    All or nothing: raises `ProtocolError` ``bad_seed``."""
    code = "bad_seed"
    _check_blocks(session, message.blocks, code, unique=False)
    _check_lengths(code, message.blocks, message.versions, message.based_on)
    layouts = [session.store.blocks[block].published_layout for block in message.blocks]
    parts = _split(message.payload, layouts, code)
    if not bool(torch.isfinite(message.payload).all()):
        raise ProtocolError(code, "the seed has infinite or undefined numbers")
    seeds: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for block, version, part in zip(message.blocks, message.versions, parts, strict=True):
        held = seeds[block]
        if held and version <= max(held):
            raise ProtocolError(
                code,
                f"version {version} of block {session.store.names([block])[0]} comes after "
                f"{max(held)}: send versions oldest first",
            )
        if len(held) >= session.store.settings.max_bases:
            raise ProtocolError(
                code, f"more than {len(held)} versions of block {session.store.names([block])[0]}"
            )
        held[version] = part
    for block, versions in seeds.items():
        session.store.seed(block, versions)


def take_ack(session: Session, message: Ack) -> None:
    """Stop resending the versions that arrived."""
    if message.what != "published":
        raise ProtocolError("unexpected", f"a worker takes no ack of {message.what!r}")
    _check_blocks(session, message.blocks, "bad_ack", unique=False)
    _check_lengths("bad_ack", message.blocks, message.numbers)
    for block, version in zip(message.blocks, message.numbers, strict=True):
        session.store.acknowledge(block, version)


def _check_blocks(session: Session, blocks: Sequence[int], code: str, *, unique: bool) -> None:
    size = len(session.store.blocks)
    for block in blocks:
        if not 0 <= block < size:
            raise ProtocolError(code, f"block {block} is not in this session's table of {size}")
    if unique and len(set(blocks)) != len(blocks):
        raise ProtocolError(code, "a block comes twice in one message")


def _check_lengths(code: str, blocks: Sequence[int], *lists: Sequence[int]) -> None:
    for other in lists:
        if len(other) != len(blocks):
            raise ProtocolError(code, f"{len(blocks)} blocks with {len(other)} numbers beside them")


def _join(sent: Sent, layouts: Sequence[Layout], code: str) -> list[Tensor]:
    wide, narrow = sent_sizes(layouts)
    got = [(t.dtype, list(t.shape)) for t in sent]
    if got != [(torch.float32, [wide]), (torch.float16, [narrow])]:
        told = " and ".join(f"{dtype} {shape}" for dtype, shape in got)
        raise ProtocolError(
            code,
            f"the message holds {told}: the blocks' layouts need torch.float32 [{wide}] and "
            f"torch.float16 [{narrow}] (is wire_dtype the same on both sides?)",
        )
    return join(layouts, sent)


def _split(payload: Tensor, layouts: Sequence[Layout], code: str) -> list[Tensor]:
    expected = sum(layout.size for layout in layouts)
    if payload.dtype != torch.float32 or payload.dim() != 1 or payload.numel() != expected:
        raise ProtocolError(
            code,
            f"the payload is {payload.dtype} {list(payload.shape)}: the blocks' layouts need "
            f"float32 [{expected}]",
        )
    return list(torch.split(payload, [layout.size for layout in layouts]))
