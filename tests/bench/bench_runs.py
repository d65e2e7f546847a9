"""Runs `distcurv bench` as a user would, and reads what it left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distcurv import cli

HEAD = {
    "schema": int,
    "benchmark": str,
    "command": str,
    "date": str,
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "threads": int,
    "load_average_1min": dict,
    "results": list,
}


def bench(out: Path, name: str, *options: str) -> dict[str, Any]:
    """The JSON of a benchmark that must succeed; its picture must be there too."""
    code = cli.main(["bench", name, *options, "--out", str(out)])
    assert code == 0
    assert (out / f"{name}.png").stat().st_size > 5_000
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    for key, kind in HEAD.items():
        assert isinstance(content[key], kind), key
    assert content["benchmark"] == name
    assert content["command"].startswith(f"distcurv bench {name} ")
    assert set(content["machine"]) == {"cpu", "cores", "device", "gpu", "system"}
    assert set(content["versions"]) >= {"distcurv", "torch", "python", "pyzmq"}
    return content


def check_spread(summary: dict[str, float]) -> None:
    """A median between its extremes, all positive."""
    assert 0 < summary["min"] <= summary["median"] <= summary["max"] < math.inf
    assert summary["n"] >= 1
