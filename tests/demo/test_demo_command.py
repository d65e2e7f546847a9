"""``distcurv demo``: a bad value gets one clear line and exit code 2, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distcurv import cli
from distcurv.demo import command, driver
from distcurv.demo.settings import DemoSettings
from distcurv.demo.tasks import TASKS
from distcurv.errors import ConfigError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DemoSettings, Path, bool]]:
    """Calls of the driver, which is replaced."""
    calls: list[tuple[DemoSettings, Path, bool]] = []

    def run_demo(settings: DemoSettings, out: Path, *, summary_on_stdout: bool = False) -> int:
        calls.append((settings, out, summary_on_stdout))
        return 0

    monkeypatch.setattr(driver, "run_demo", run_demo)
    return calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps", "0", "at least 1"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps"], ["--steps"]),
        (["--rank", "0"], ["--rank", "0", "at least 1"]),
        (["--rank", "1.5"], ["--rank", "1.5"]),
        (["--nproc-per-node", "0"], ["--nproc-per-node", "0", "at least 1"]),
        (["--nproc-per-node", "257"], ["--nproc-per-node", "257", "at most 256"]),
        (["--task", "charlm", "--nproc-per-node", "33"], ["--nproc-per-node", "at most 32"]),
        (["--workers", "-1"], ["--workers", "-1", "at least 0"]),
        (["--install-delay", "-1"], ["--install-delay", "-1", "at least 0"]),
        (["--install-delay", "61"], ["--install-delay", "61", "at most 60"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", str(2**31)], ["--seed", "at most 2147483647"]),
        (["--task", "mnist"], ["--task", "mnist", "autoencoder", "charlm"]),
        (["--speed", "9"], ["--speed"]),
        (["extra"], ["extra"]),
    ],
)
def test_bad_value_gets_one_line_and_code_2(
    arguments: list[str],
    words: list[str],
    started: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["demo", *arguments])
    except SystemExit as exit_:
        code = exit_.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    for word in words:
        assert word in printed.err
    assert started == []


def test_out_that_cannot_be_a_directory(
    started: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["demo", "--out", str(name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--out" in line
        assert str(name) in line
    assert started == []


def test_missing_package_is_named(
    started: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(command._NEEDED_BY_TASK, "autoencoder", {"no_such_module": "no-such"})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such" in line
    assert "pip install 'distcurv[demo]'" in line
    assert cli.main(["demo", "--out", str(tmp_path), "--task", "charlm"]) == 0


def test_arguments_become_settings(started: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    words = "--task charlm --nproc-per-node 4 --workers 0 --steps 7 --rank 3 --install-delay 0"
    assert cli.main(["demo", *words.split(), "--seed", "5", "--json", "--out", str(out)]) == 0
    wanted = DemoSettings(
        task="charlm", ranks=4, workers=0, steps=7, rank=3, install_delay=0, seed=5
    )
    assert started == [(wanted, out, True)]
    assert out.is_dir()


def test_defaults(started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    ((settings, out, as_json),) = started
    assert (settings.task, settings.ranks, settings.workers) == ("autoencoder", 2, 1)
    assert settings.install_delay is None
    assert settings.resolved_steps == TASKS["autoencoder"].default_steps
    assert (out, as_json) == (Path("runs/demo"), False)


def test_settings_survive_the_way_to_the_ranks() -> None:
    settings = DemoSettings(task="charlm", steps=3, ranks=1, workers=2, rank=4, install_delay=6)
    assert DemoSettings.from_json(settings.to_json()) == settings
    with pytest.raises(ConfigError, match="--rank"):
        DemoSettings.from_json(settings.to_json().replace('"rank": 4', '"rank": 0'))
