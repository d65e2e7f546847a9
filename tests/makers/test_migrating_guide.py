"""The distcurv code in docs/migrating.md runs as it stands there, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

GUIDE = Path(__file__).parents[2] / "docs" / "migrating.md"


def blocks(of: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in found if block.startswith(f"# {of}\n")]


def test_the_code_runs() -> None:
    names: dict[str, Any] = {}
    before: list[torch.Tensor] = []
    for block in blocks("distcurv"):
        exec(compile(block, str(GUIDE), "exec"), names)
        before = before or [p.detach().clone() for p in names["model"].parameters()]
    after = list(names["model"].parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_every_peer_is_on_the_left() -> None:
    for peer, count in (("ASDL", 2), ("low-rank ASDL", 1), ("kfac-pytorch", 1)):
        assert len(blocks(peer)) == count
