"""The code in docs/guides/custom-layers.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from distcurv import layers
from distcurv.layers import LAYERS, find_layer

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "custom-layers.md"


def test_the_guides_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LAYERS", dict(LAYERS))
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4  # the first one names no types of its own
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks[1:]), str(GUIDE), "exec"), names)
    my_linear = names["MyLinear"]
    assert isinstance(my_linear, type) and issubclass(my_linear, nn.Linear)
    assert find_layer(my_linear(2, 3)) is LAYERS[nn.Linear]
