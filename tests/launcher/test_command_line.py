"""Bad values give one line and exit code 2; the script's words are told from everybody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import REMAINDER
from pathlib import Path

import pytest
from launcher_processes import ROOT

from distcurv import cli
from distcurv.errors import ConfigError
from distcurv.launcher import torchrun_options
from distcurv.launcher.torchrun_options import Split, check, split, with_rendezvous

SCRIPT = str(Path(__file__).with_name("script.py"))
OWN_FLAGS, OWN_OPTIONS = frozenset({"--help"}), frozenset({"--workers"})


def parts_of(*words: str) -> Split:
    return split(words, OWN_FLAGS, OWN_OPTIONS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["run", "--workers", "many", SCRIPT], "--workers: 'many'"),
        (["run", "--workers", "-1", SCRIPT], "--workers: '-1'"),
        (["run", "--worker-threads", "0", SCRIPT], "--worker-threads: '0'"),
        (["run", "--worker-device", "cpu,tpu", SCRIPT], "--worker-device: 'tpu'"),
        (["run", "--grace", "soon", SCRIPT], "--grace: 'soon'"),
        (["run", "--nproc-per-node", "0", SCRIPT], "--nproc-per-node 0"),
        (["run", "--nnodes", "two", SCRIPT], "--nnodes two"),
        (["run", "--frobnicate", "3", SCRIPT], "unknown option --frobnicate"),
        (["run", "--rdzv-id"], "--rdzv-id needs a value"),
        (["run", "no-such-script.py"], "no such script: no-such-script.py"),
        (["run", "--nproc-per-node", "2"], "no script given"),
        (["worker", "--threads", "none"], "--threads: 'none'"),
        (["worker", "--device", "tpu"], "--device: 'tpu'"),
        (["worker", "--frobnicate"], "--frobnicate"),
        (["worker", "--bind", "tcp://0.0.0.0:5555"], "0.0.0.0"),
        (["worker", "--bind", "nonsense"], "nonsense"),
        (["worker", "--ready-file", "/no-such-folder/ready"], "/no-such-folder"),
    ],
)
def test_a_bad_value_is_one_line_and_code_2(
    words: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(words)
    except SystemExit as end:
        code = end.code
    out, err = capfd.readouterr()
    assert code == 2
    assert says in err and err.count("\n") == 1 and out == ""


def test_ctrl_c_while_a_command_loads(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["demo"]) == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["worker", "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    assert "usage: distcurv" in capsys.readouterr().out


def test_every_word_goes_to_the_right_place() -> None:
    parts = parts_of(
        *("--workers", "3", "--nproc_per_node=2", "-m", "--rdzv-id", "--workers", "--new=1"),
        *("pkg.train", "--workers", "8", "--", "-m"),
    )
    assert parts.own == ["--workers", "3"]
    assert parts.torchrun == ["--nproc-per-node=2", "-m", "--rdzv-id", "--workers", "--new=1"]
    assert parts.program == ["pkg.train", "--workers", "8", "--", "-m"]


def test_two_dashes_end_the_options() -> None:
    assert parts_of("--workers=1", "--", "--odd-name.py", "x").program == ["--odd-name.py", "x"]


@pytest.mark.parametrize(
    ("words", "env", "alone"),
    [
        ([], {}, True),
        (["--nproc-per-node", "4"], {"HOME": "/"}, True),
        (["--nnodes", "1:1"], {}, True),
        (["--nnodes", "2"], {}, False),
        (["--nnodes", "1:2"], {}, False),
        (["--standalone"], {}, False),
        (["--rdzv-backend=c10d"], {}, False),
        (["--master_port", "5"], {}, False),
        ([], {"PET_NNODES": "2"}, False),
        ([], {"PET_RDZV_BACKEND": "c10d"}, False),
    ],
)
def test_standalone_is_added_only_to_a_lone_node(
    words: list[str], env: dict[str, str], alone: bool
) -> None:
    parts = parts_of(*words, "train.py")
    assert with_rendezvous(parts, env) == (["--standalone"] if alone else []) + parts.torchrun


def test_a_module_or_program_needs_no_file() -> None:
    check(parts_of("-m", "pkg.train"))
    check(parts_of("--no-python", "prog"))
    with pytest.raises(ConfigError, match="no such script"):
        check(parts_of("prog"))


def test_the_table_of_options_matches_the_installed_torchrun() -> None:
    from torch.distributed.run import get_args_parser

    flags, valued = set(), set()
    for action in get_args_parser()._actions:
        names = {name.replace("_", "-") for name in action.option_strings}
        if action.nargs == 0:
            flags |= names
        elif action.nargs != REMAINDER:
            valued |= names
    flags -= {"-h", "--help"}
    # Those of the installed torch must be known; older ones may lack some that are known here.
    assert flags <= torchrun_options.FLAGS and valued <= torchrun_options.WITH_VALUE
    assert not flags & torchrun_options.WITH_VALUE and not valued & torchrun_options.FLAGS


def test_the_launcher_loads_no_torch() -> None:
    code = "import sys, distcurv.cli, distcurv.launcher.run_command; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert said.stdout == "False\n"
