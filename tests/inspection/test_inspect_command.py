"""``distcurv inspect``: the plan of a model, from the command line."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distcurv import cli

MODELS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))

def large():
    return nn.Sequential(nn.Linear(1 << 20, 1 << 16), nn.Linear(1 << 16, 10))

def needs(width, depth=2):
    return nn.Linear(width, depth)

def a_number():
    return 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    @classmethod
    def make(cls):
        return cls()

ready = Net()
text = "no factory"
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "inspected_models.py").write_text(MODELS)
    (tmp_path / "inspected_broken.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("inspected_models", "inspected_broken"):
        sys.modules.pop(name, None)


def inspect(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["inspect", *words])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, _ = inspect(capsys, *words, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_table_has_every_parameter_and_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = inspect(capsys, "inspected_models:small", "--rank", "4")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.split()]
    assert ["0.weight", "40x6", "0", "lowrank", "7", "x", "40"] in [line[:7] for line in lines]
    assert {line[0] for line in lines} >= {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "403 of 403 trainable parameters covered (100.0%) by 2 blocks" in out
    assert not dist.is_initialized()


def test_without_rich_it_is_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rich" or name.startswith("rich."):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    code, out, _ = inspect(capsys, "inspected_models:small")
    assert code == 0
    assert out.splitlines()[1].startswith("---")
    assert out.splitlines()[-1].startswith("403 of 403")


def test_settings_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "inspected_models:small", "--rank", "3", "--world", "2")
    first = found["rows"][0]
    assert first["kind"] == "lowrank"
    assert [side["rank"] for side in first["sides"]] == [3, 3]
    assert {row["owner"] for row in found["rows"]} == {0, 1}
    dense = as_json(capsys, "inspected_models:small", "--kind", "dense")
    assert {row["kind"] for row in dense["rows"]} == {"dense"}
    assert (dense["covered"], dense["trainable"], dense["blocks"]) == (403, 403, 2)


def test_a_model_of_300_gb_needs_no_memory_on_meta(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "inspected_models:large", "--meta")
    assert found["covered"] == (1 << 36) + (1 << 16) + 10 * (1 << 16) + 10
    assert found["coverage"] == 1.0


@pytest.mark.parametrize("path", ["Net", "Net.make", "ready"])
def test_factories_may_be_classes_methods_and_models(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, f"inspected_models:{path}")
    assert [row["parameter"] for row in found["rows"]] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspected_models"], "'inspected_models' is no module:factory: give e.g."),
        (["inspected_models:"], "is no module:factory"),
        (["no_such_models:small"], "there is no module 'no_such_models': looked in "),
        (["inspected_models.deeper:small"], "there is no module 'inspected_models.deeper'"),
        (["inspected_models:tiny"], "inspected_models:tiny: <module 'inspected_models'"),
        (["inspected_models:needs"], "needs(width, depth=2) needs arguments: wrap it in"),
        (["inspected_models:a_number"], "returned int: it must return a torch.nn.Module"),
        (["inspected_models:text"], "is 'no factory': give a function or class"),
        (["inspected_models:small", "--rank", "0"], "--rank: '0'"),
        (["inspected_models:small", "--world", "none"], "--world: 'none'"),
        (["inspected_models:small", "--kind", "qr"], "invalid choice: 'qr'"),
        ([], "MODULE:FACTORY"),
    ],
)
def test_a_bad_value_is_one_line_and_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(["inspect", *words])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert says in err and err.count("\n") == 1 and out == ""


def test_what_the_users_module_raises_is_shown_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        cli.main(["inspect", "inspected_broken:make"])


def test_help_tells_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("MODULE:FACTORY", "--rank", "--kind", "--world", "--meta", "--json"):
        assert option in out
