"""One training as a value: what is asked for, under which name its result is kept.

A result stays valid as long as nothing that it depends on changes: the request, the versions of
torch and Python, what tasks and methods are, and for distcurv's own methods the package's code.
All of that is in the name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import distcurv
from distcurv.bench.converge_methods import SERVED

HARDWARE = ("one", "threads", "ranks")
_SETTINGS = tuple(f"bench/converge_{part}.py" for part in ("methods", "peers", "tasks"))
_CODE = ("config", "wiring.py", "curvature", "layers", "optim", "train", "wire", "worker")


@dataclass(frozen=True)
class Request:
    """One training.

    Attributes:
        task, method: keys of ``TASKS`` and ``MAKERS``.
        lr, seed, steps: of the training.
        rows: loss terms of a batch, a multiple of the task's ``rows_per_sample``.
        eval_every: steps between two evaluations; 0 evaluates never and times every step.
        stop_at: end once an evaluation is at or below this loss.
        install_delay: of distcurv's methods: None for a worker process and real asynchrony, else
            the deterministic mode in process.
        interval: steps between two installs of distcurv's methods; None: what they have by default.
        hardware: ``one`` core, two ``threads``, or two data-parallel ``ranks``; distcurv's methods
            always train on one core, their worker is on the other.
        repetition: tells apart timings that are otherwise the same.
        device: ``cpu`` or ``cuda``; the worker has it too.
    """

    task: str
    method: str
    lr: float
    seed: int
    steps: int
    rows: int
    eval_every: int
    stop_at: float | None = None
    install_delay: int | None = None
    interval: int | None = None
    hardware: str = "one"
    repetition: int = 0
    device: str = "cpu"

    @property
    def timed(self) -> bool:
        """Whether this training is for its times, and so must run alone and on fixed cores."""
        return self.eval_every == 0

    @property
    def has_worker(self) -> bool:
        """Whether a worker process belongs to it."""
        return self.method in SERVED and self.install_delay is None

    def to_json(self) -> str:
        """For a command line; the inverse of `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @property
    def file_name(self) -> str:
        """Where its result is kept."""
        code = code_digest(_SETTINGS + (_CODE if self.method in SERVED else ()))
        text = "\n".join((self.to_json(), torch.__version__, platform.python_version(), code))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{self.task}-{self.method}-lr{self.lr:g}-seed{self.seed}-{digest}.json"


@functools.cache
def code_digest(names: tuple[str, ...]) -> str:
    """SHA-256 of these files and folders of the package."""
    root = Path(distcurv.__file__).parent
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Cache:
    """A folder with one JSON file for each training that has ended.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, request: Request) -> dict[str, Any] | None:
        """The kept result, None if there is none."""
        file = self._folder / request.file_name
        if not file.exists():
            return None
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["result"]
        return kept

    def put(self, request: Request, result: dict[str, Any]) -> None:
        """Keep a result; an interruption leaves the whole file or none."""
        content = {"request": dataclasses.asdict(request), "result": result}
        file = self._folder / request.file_name
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(file)
