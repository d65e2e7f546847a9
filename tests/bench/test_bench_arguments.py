"""``distcurv bench``: a bad value gets one clear line and exit code 2 before work begins."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from distcurv import cli
from distcurv.bench.command import BENCHMARKS


def code_of(arguments: list[str]) -> int:
    try:
        return cli.main(["bench", *arguments])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["BENCHMARK"]),
        (["speed"], ["speed", "step", "wire"]),
        (["bytes", "--model", "gpt"], ["--model", "gpt", "bert-large"]),
        (["bytes", "--shapes", "10x0"], ["--shapes", "10x0"]),
        (["bytes", "--rank", "0"], ["--rank", "0", "at least 1"]),
        (["bytes", "--rule", "adam"], ["--rule", "adam", "kfac"]),
        (["refresh", "--dims", "64,4"], ["--dims", "4", "at least 8"]),
        (["refresh", "--dims", "64,64"], ["--dims", "twice"]),
        (["refresh", "--ranks", "a"], ["--ranks", "'a'"]),
        (["refresh", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["refresh", "--repetitions", "0"], ["--repetitions", "at least 1"]),
        (["step", "--model", "mlp"], ["--model", "mlp", "convnet"]),
        (["step", "--methods", "sgd,lion"], ["--methods", "lion", "asdl-kfac"]),
        (["step", "--worker", "remote"], ["--worker", "remote", "idle"]),
        (["step", "--steps", "15"], ["--steps", "15", "multiple"]),
        (["step", "--interval", "1"], ["--interval", "at least 4"]),
        (["step", "--capture-interval", "11"], ["--capture-interval", "11", "at most"]),
        (["step", "--device", "gpu"], ["--device", "gpu"]),
        (["staleness", "--tasks", "mnist"], ["--tasks", "mnist", "charlm"]),
        (["staleness", "--delays", "0,-5"], ["--delays", "-5"]),
        (["staleness", "--batches", "0"], ["--batches", "at least 1"]),
        (["staleness", "--correction", "some"], ["--correction", "some", "without"]),
        (["staleness", "--seeds", "0"], ["--seeds", "at least 1"]),
        (["converge", "--tasks", "mnist"], ["--tasks", "mnist", "digits"]),
        (["converge", "--methods", "lion"], ["--methods", "lion", "lowrank-soap"]),
        (["converge", "--hardware", "two"], ["--hardware", "two", "equal"]),
        (["converge", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["staleness", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["offload", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["capture", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["wire", "--links", "udp"], ["--links", "udp", "memory"]),
        (["wire", "--kilobytes", "0"], ["--kilobytes", "at least 1"]),
        (["wire", "--speed", "9"], ["--speed"]),
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
    assert code_of(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert all(word in line for word in words), line
    assert captured.out == ""


def test_a_folder_that_cannot_be_made_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    assert code_of(["bytes", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "benchmark", ["step", "capture", "refresh", "offload", "converge", "staleness"]
)
def test_a_gpu_that_is_not_there_is_refused_by_all_that_compute(
    benchmark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert code_of([benchmark, "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no CUDA device" in line


def test_a_second_core_says_nothing_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert code_of(["converge", "--device", "cuda"]) == 2
    assert "--hardware one-core" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "module", "package"),
    [
        ("soap", "pytorch_optimizer", "pytorch-optimizer"),
        ("shampoo", "pytorch_optimizer", "pytorch-optimizer"),
        ("asdl-kfac", "asdl.precondition", "asdfghjkl"),
    ],
)
def test_a_missing_peer_gets_one_line(
    method: str,
    module: str,
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it then fails
    monkeypatch.chdir(tmp_path)
    assert code_of(["step", "--methods", method]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert method in line and package in line and "distcurv[bench]" in line


def test_missing_rich_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert code_of(["bytes"]) == 2
    assert "rich" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in BENCHMARKS)
    for name in BENCHMARKS:
        assert code_of([name, "--help"]) == 0
        assert f"runs/bench-{name}" in capsys.readouterr().out


def test_muon_refuses_convolutions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["step", "--model", "convnet", "--methods", "muon", "--out", str(tmp_path)]
    assert code_of(arguments) == 2
    assert "convolutions" in capsys.readouterr().err.strip().splitlines()[-1]
