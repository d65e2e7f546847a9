"""Where results go: one JSON file that says under which conditions its numbers were measured."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distcurv import __version__
from distcurv.demo.settings import output_directory

SCHEMA = 1
# What else is measured, or measures, as far as it is installed: the links' library and the peers.
_PACKAGES = ("pyzmq", "numpy", "pytorch-optimizer", "asdfghjkl", "singd")


class Record:
    """One benchmark's conditions, taken when it starts, and its results when it ends.

    Args:
        args: the parsed options; ``benchmark`` names the files, ``out`` the directory for them,
            which is made if need be.
        settings: the options as they were understood.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the directory cannot be made or written.
    """

    def __init__(
        self, args: argparse.Namespace, settings: Mapping[str, Any], device: str = "cpu"
    ) -> None:
        self._folder = output_directory(args.out)
        self._name = args.benchmark
        self._head = {
            "schema": SCHEMA,
            "benchmark": args.benchmark,
            "command": command_line(args),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(device),
            "versions": {
                "distcurv": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **_versions(_PACKAGES),
            },
            "settings": dict(settings),
        }
        self._load_before = _load()

    @property
    def picture(self) -> Path:
        """Where the picture goes."""
        return self._folder / f"{self._name}.png"

    @property
    def file(self) -> Path:
        """Where the JSON goes."""
        return self._folder / f"{self._name}.json"

    def write(self, results: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """Write the JSON and return its content.

        Args:
            results: one map for each row of the benchmark's table.
            more: further entries beside ``results``.
        """
        content = {
            **self._head,
            "threads": torch.get_num_threads(),
            # Over 1 on the training core's account means that others used the machine as well.
            "load_average_1min": {"before": self._load_before, "after": _load()},
            **more,
            "results": [dict(row) for row in results],
        }
        text = json.dumps(content, indent=2, allow_nan=False)
        self.file.write_text(text + "\n", encoding="utf-8")
        return content


def command_line(args: argparse.Namespace) -> str:
    """The command that gives these options again, defaults written out."""
    words = ["distcurv", "bench", args.benchmark]
    for key, value in vars(args).items():
        option = key.replace("_", "-")
        if key == "benchmark" or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{option}", text]
    return shlex.join(words)


def machine(device: str) -> dict[str, Any]:
    """What computed: processor, usable cores, accelerator, system."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": device,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _cpu_model() -> str:
    """As Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _load() -> float | None:
    """Processes that ran or wanted to, averaged over a minute; None where there is no such."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
