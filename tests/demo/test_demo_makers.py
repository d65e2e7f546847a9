"""``distcurv demo --makers``: its options, its registry, and a small run with all it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_process import DemoProcess, living

from distcurv import cli, makers
from distcurv.demo import makers_run
from distcurv.demo.makers_registry import (
    BASELINES,
    CHOICES,
    EARLY_STEPS,
    REFUSED,
    Choice,
    parse_names,
)
from distcurv.demo.makers_report import makers_table
from distcurv.demo.makers_settings import MakersSettings
from distcurv.demo.makers_train import train
from distcurv.errors import ConfigError

STEPS = 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kfca"], ["--makers", "'kfca'", "kfac", "kron-psgd"]),
        (["kfac,"], ["--makers", "''"]),
        (["kfac,newton"], ["--makers", "'newton'", "38,026"]),
        (["kfac", "--task", "charlm"], ["--task", "'charlm'", "autoencoder"]),
        (["kfac", "--steps", "0"], ["--steps", "0", "at least 1"]),
        (["kfac", "--rank", "0"], ["--rank", "0", "at least 1"]),
        (["kfac", "--seed", "-1"], ["--seed", "-1"]),
        (["kfac", "--seed", str(2**31)], ["--seed", "at most 2147483647"]),
        (["kfac", "--workers", "-1"], ["--workers", "-1", "at least 0"]),
        (["kfac", "--nproc-per-node", "2"], ["--nproc-per-node", "2", "--makers"]),
        (["kfac", "--install-delay", "5"], ["--install-delay", "5", "--makers"]),
    ],
)
def test_bad_value_gets_one_line_and_code_2(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--makers", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    for word in words:
        assert word in line


def test_arguments_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def run_makers(settings: MakersSettings, out: Path, *, summary_on_stdout: bool) -> int:
        calls.append((settings, out, summary_on_stdout))
        return 0

    monkeypatch.setattr(makers_run, "run_makers", run_makers)
    monkeypatch.chdir(tmp_path)
    words = "--makers soap,kfac,soap --steps 7 --seed 5 --workers 2 --rank 3 --json --out a"
    assert cli.main(["demo", *words.split()]) == 0
    assert cli.main(["demo", "--makers", "adamw", "--nproc-per-node", "1"]) == 0
    names = (*BASELINES, "soap", "kfac")
    wanted = MakersSettings(names=names, steps=7, seed=5, workers=2, rank=3)
    assert calls == [
        (wanted, Path("a"), True),
        (MakersSettings(names=BASELINES, workers=0, rank=16), Path("runs/demo"), False),
    ]
    assert calls[1][0].resolved_steps == 200


def test_every_maker_has_a_choice_or_a_reason() -> None:
    shown = {choice.maker for choice in CHOICES.values()}
    missing = {
        name
        for name in makers.__all__
        if name.endswith("GradientMaker") and getattr(makers, name) not in shown
    }
    assert missing == {
        "GradientMaker",  # the baselines
        "PreconditionedGradientMaker",
        "NaturalGradientMaker",  # by their shapes
        "EmpNaturalGradientMaker",
        "FullNaturalGradientMaker",
        "LayerWiseNaturalGradientMaker",
        "NewtonGradientMaker",
        "PsgdGradientMaker",
        "SmwEmpNaturalGradientMaker",
    }
    assert set(REFUSED) == {"full", "layer-wise", "newton", "psgd", "smw"}
    assert not set(REFUSED) & set(CHOICES)


def test_refusal_names_the_true_size() -> None:
    model = MakersSettings(names=()).problem.build(0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} x {count:,}" in REFUSED["newton"]
    assert f"{count**2 * 4 / 1e9:.1f} GB" in REFUSED["newton"]
    layers = [m.weight.numel() + m.bias.numel() for m in model if isinstance(m, torch.nn.Linear)]
    assert f"{max(layers):,} x {max(layers):,}" in REFUSED["layer-wise"]
    with pytest.raises(ConfigError, match="leaves out"):
        parse_names("layer-wise")


@pytest.mark.parametrize("name", CHOICES)
def test_each_choice_takes_a_step_of_its_own(name: str) -> None:
    settings = MakersSettings(names=(name,), steps=1, rank=8)
    seen: list[tuple[int, float]] = []

    def watch(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return True

    training = train(CHOICES[name], settings, 0, watch)
    assert training is not None
    assert not training.diverged
    start = settings.problem.loss(
        settings.problem.build(0), settings.problem.batches(0, 0, 1, 0)
    ).item()
    assert training.losses == pytest.approx([start], rel=1e-6)
    assert seen == [(1, training.losses[0])]
    untrained = settings.problem.evaluate(settings.problem.build(0))
    # SOAP's first gradient makes the basis: only biases move.
    assert training.final_loss is not None
    assert training.final_loss != untrained


def test_training_that_diverges_ends_early_and_is_told() -> None:
    settings = MakersSettings(names=("sgd",), steps=50)
    training = train(Choice(lr=1e38), settings, 0, lambda step, loss: True)
    assert training is not None
    assert training.diverged
    assert training.final_loss is None
    assert len(training.losses) < 50


def test_training_ends_when_it_is_told_to() -> None:
    settings = MakersSettings(names=("sgd",), steps=50)
    seen: list[int] = []

    def watch(step: int, loss: float) -> bool:
        seen.append(step)
        return step < 2

    assert train(CHOICES["sgd"], settings, 0, watch) is None
    assert seen == [1, 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("makers")
    words = ["demo", "--makers", "soap-lowrank,kfac", "--steps", str(STEPS), "--rank", "5"]
    assert cli.main([*words, "--out", str(out)]) == 0
    return out


def test_summary_tells_of_every_training(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["task"], summary["steps"], summary["ranks"]) == ("autoencoder", STEPS, 1)
    assert list(summary["makers"]) == ["sgd", "adamw", "soap-lowrank", "kfac"]
    for name, row in summary["makers"].items():
        assert row["steps_done"] == STEPS
        assert row["lr"] == CHOICES[name].lr
        assert row["maker"] == CHOICES[name].maker_name
        assert row["final_loss"] > 0
        assert row["seconds"] > 0
        assert row["median_step_ms"] > 0
    assert summary["makers"]["soap-lowrank"]["settings"]["rank"] == 5
    assert "rank" not in summary["makers"]["kfac"]["settings"]
    assert summary["makers"]["kfac"]["versions_installed"] == STEPS * 8
    assert summary["makers"]["sgd"]["versions_installed"] is None


def test_trainings_start_alike(finished: Path) -> None:
    curves = json.loads((finished / "curves.json").read_text())
    assert {len(curve["losses"]) for curve in curves.values()} == {STEPS}
    assert {len(curve["step_ms"]) for curve in curves.values()} == {STEPS}
    assert len({curve["losses"][0] for curve in curves.values()}) == 1
    assert len({curve["losses"][-1] for curve in curves.values()}) == len(curves)


def test_picture_is_a_png_of_useful_size(finished: Path) -> None:
    data = (finished / "makers.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width >= 1200
    assert height >= 500


def test_the_table_says_what_workers_made_where_there_are_some(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    inline = [column.header for column in makers_table(summary).columns]
    summary["workers"] = 1
    summary["makers"]["kfac"]["versions_from_workers"] = 7
    *columns, versions = makers_table(summary).columns
    assert [column.header for column in columns] == inline
    assert list(versions.cells) == ["-", "-", f"{STEPS * 8} (0)", f"{STEPS * 8} (7)"]


def test_json_has_stdout_to_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["demo", "--makers", "sgd", "--steps", "1", "--json", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "summary.json").read_text())
    assert "adamw: 1 steps" in printed.err


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    words = ["--makers", "kfac", "--workers", "1", "--steps", "1000000"]
    with DemoProcess(tmp_path, *words, "--out", str(tmp_path / "out")) as demo:
        demo.read_until(lambda text: "steps with each of sgd, adamw, kfac" in text)
        before = demo.look()
        assert len(before) >= 2  # the trainings and a worker
        demo.interrupt_group()
        assert demo.wait() == 130
        assert living(before) == set()
        assert "Traceback" not in demo.text
        assert "ended by SIGINT" in demo.text
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("name", CHOICES)
def test_workers_go_to_the_makers_that_are_served(name: str) -> None:
    model = MakersSettings(names=()).problem.build(0)
    choice = CHOICES[name]
    maker = choice.make(model, rank=8, workers=["tcp://127.0.0.1:9"], seed=0)
    if not isinstance(maker, makers.PreconditionedGradientMaker):
        assert name in BASELINES
        return
    try:
        assert maker.served == choice.served
        assert maker.config.workers == (["tcp://127.0.0.1:9"] if choice.served else 0)
        assert maker.config.early_steps == (EARLY_STEPS if choice.served else None)
        assert maker.config.rank == (8 if choice.low_rank else None)
        assert maker.metrics().get("links_total") == (1 if choice.served else None)
    finally:
        maker.close()
