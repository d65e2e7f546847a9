"""What a worker may be told, validated once, so that no limit is checked halfway through a job."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distcurv.errors import ConfigError
from distcurv.wire.checks import Limits

GIB = 2**30
MESSAGE_BYTES = Limits().payload_bytes  # what one message may carry


@dataclass(frozen=True)
class WorkerSettings:
    """Limits and periods of one worker.  Raises `ConfigError` for a value that cannot work.

    Attributes:
        heartbeat: seconds between heartbeats, and between resends of what is not acknowledged.
        session_timeout: seconds of silence after which a session is ended.
        max_blocks: most blocks of all sessions together.
        max_memory: bytes that the blocks of all sessions may need together (worst case).
        max_batch: most blocks in one refresh call.
        max_batch_bytes: most bytes published by one call (a larger block goes alone), which also
            bounds one message to an owner.
        max_queued: statistics that may wait per block before more of them are refused.
        max_bases: versions of one block kept as bases for statistics that may still come.
        patience: seconds of waiting that a residual of 1 is worth (see `schedule`).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: torch threads of a worker process (an inline worker leaves them as they are).
    """

    heartbeat: float = 1.0
    session_timeout: float = 10.0
    max_blocks: int = 4096
    max_memory: int = 8 * GIB
    max_batch: int = 64
    max_batch_bytes: int = GIB // 4
    max_queued: int = 4
    max_bases: int = 16
    patience: float = 1.0
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("heartbeat", "session_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"WorkerSettings.{name} is {value}: give seconds above 0")
        if self.session_timeout <= self.heartbeat:
            raise ConfigError(
                f"WorkerSettings.session_timeout is {self.session_timeout} s with a heartbeat of "
                f"{self.heartbeat} s: give a timeout of several heartbeats"
            )
        if not (math.isfinite(self.patience) and self.patience >= 0):
            raise ConfigError(f"WorkerSettings.patience is {self.patience}: give 0 s or more")
        for name, least in (
            ("max_blocks", 1),
            ("max_memory", 1),
            ("max_batch", 1),
            ("max_batch_bytes", 1),
            ("max_queued", 1),
            ("max_bases", 3),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"WorkerSettings.{name} is {value!r}: give a whole number from {least}"
                )
        if self.max_batch_bytes > MESSAGE_BYTES:
            raise ConfigError(
                f"WorkerSettings.max_batch_bytes is {self.max_batch_bytes}: one message carries "
                f"at most {MESSAGE_BYTES}"
            )
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"WorkerSettings.device is {self.device!r}: use cpu, cuda or cuda:N ({error})"
            ) from error
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"WorkerSettings.device is {self.device!r}: use cpu, cuda or cuda:N")
