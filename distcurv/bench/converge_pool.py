"""Runs trainings in processes of their own, some side by side, and keeps what they find.

A training that is kept already is not run again, so a study that was interrupted goes on where it
was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from distcurv.bench.converge_request import Cache, Request
from distcurv.bench.converge_train import MEETING_VARIABLE, RANK_VARIABLE
from distcurv.errors import LaunchError

Result = dict[str, Any]
Known = Mapping[Request, Result]
_PROGRAM = "distcurv.bench.converge_train"


class Pool:
    """Trainings side by side.

    Args:
        cache: where results are kept.
        jobs: how many cores' worth of trainings run at once; a training with a worker process
            counts as two, so that what is real about its asynchrony is not a crowded machine.
        done: called with each request whose result became known, in the calling thread.
    """

    def __init__(self, cache: Cache, jobs: int, done: Callable[[Request], None]) -> None:
        self._cache, self._jobs, self._done = cache, jobs, done
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ending = False

    def complete(self, plan: Callable[[Known], Iterable[Request]]) -> dict[Request, Result]:
        """Run what ``plan`` asks for, given what is known, until it asks for nothing new.

        Raises:
            LaunchError: a training failed for another reason than a divergence.
        """
        known: dict[Request, Result] = {}
        running: dict[Future[Result], Request] = {}
        with ThreadPoolExecutor(max_workers=self._jobs) as threads:
            try:
                while True:
                    under_way = set(running.values())
                    wanted = [
                        request
                        for request in dict.fromkeys(plan(known))
                        if request not in known and request not in under_way
                    ]
                    if self._take_kept(wanted, known):
                        continue
                    for request in wanted:
                        load = sum(map(self._weight, running.values()))
                        if load + self._weight(request) <= self._jobs:
                            running[threads.submit(self._run, request)] = request
                    if not running:
                        return known
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        request = running.pop(future)
                        known[request] = future.result()
                        self._cache.put(request, known[request])
                        self._done(request)
            except BaseException:
                self._end()
                raise

    def _take_kept(self, wanted: list[Request], known: dict[Request, Result]) -> bool:
        """Whether any of these was kept by an earlier run."""
        any_kept = False
        for request in wanted:
            kept = self._cache.get(request)
            if kept is not None:
                known[request] = kept
                any_kept = True
                self._done(request)
        return any_kept

    def _weight(self, request: Request) -> int:
        return min(self._jobs, 2 if request.has_worker else 1)

    def _end(self) -> None:
        with self._lock:
            self._ending = True
            for process in self._processes:
                process.terminate()

    def _run(self, request: Request) -> Result:
        ranks = 2 if request.hardware == "ranks" else 1
        with tempfile.TemporaryDirectory(prefix="distcurv-converge-") as name:
            folder = Path(name)
            target = folder / "result.json"
            command = [sys.executable, "-m", _PROGRAM, request.to_json(), str(target)]
            started = [
                self._start(
                    command,
                    os.environ
                    | {
                        "OMP_NUM_THREADS": "2" if request.hardware == "threads" else "1",
                        RANK_VARIABLE: str(rank),
                        MEETING_VARIABLE: str(folder / "meeting"),
                    },
                )
                for rank in range(ranks)
            ]
            errors = [process.communicate()[1] for process in started]
            with self._lock:
                self._processes -= set(started)
            for process, error in zip(started, errors, strict=True):
                if process.returncode != 0:
                    last = " / ".join(error.strip().splitlines()[-3:]) or "it said nothing"
                    raise LaunchError(
                        f"the training {request.to_json()} failed with exit code "
                        f"{process.returncode}: {last}"
                    )
            result: Result = json.loads(target.read_text(encoding="utf-8"))
            return result

    def _start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._ending:
                raise LaunchError("the study is ending: no training is started any more")
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            self._processes.add(process)
            return process
