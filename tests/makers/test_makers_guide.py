"""The code in docs/guides/makers.md runs as it stands there, and its table names real makers."""

from __future__ import annotations

import re
from pathlib import Path

from distcurv import makers

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "makers.md"


def test_the_guides_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {})


def test_every_maker_is_in_the_guide() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    base = {"PreconditionedGradientMaker"}
    named = {name for name in makers.__all__ if name.endswith("GradientMaker")} - base
    assert {name for name in named if f"`{name}`" not in text} == set()
