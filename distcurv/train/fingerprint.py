"""A cheap number that is equal on all ranks exactly while their reduced gradients are.

A rank that skipped a step() is not found by counting its own steps: its collectives merely come
one iteration late.  But its gradients are then those of another iteration, and that shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_TENSORS = 4  # gradients that are looked at
_SAMPLES = 64  # numbers per gradient


def of_text(text: str) -> int:
    """A positive 62-bit number from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def _sample(grads: Sequence[Tensor]) -> Tensor:
    parts = []
    for grad in grads[:_TENSORS]:
        flat = grad.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        parts.append(flat[::stride][:_SAMPLES].to(torch.float32))
    return torch.cat(parts).contiguous()


class Fingerprint:
    """Takes fingerprints at polls.

    On CUDA the sample is copied without waiting and used at the next poll: a mismatch is then
    found one interval later, and no step waits for the device.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._earlier: tuple[Tensor, torch.cuda.Event] | None = None

    def take(self, grads: Sequence[Tensor]) -> int:
        """A number for the control vector; 0 where there is nothing to compare."""
        if not self._enabled or not grads:
            return 0
        sample = _sample(grads)
        if not sample.is_cuda:
            return _number(sample)
        earlier = self._earlier
        host = torch.empty(sample.shape, dtype=sample.dtype, pin_memory=True)
        host.copy_(sample, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._earlier = (host, event)
        if earlier is None:
            return 0
        earlier[1].synchronize()
        return _number(earlier[0])

    def now(self, grads: Sequence[Tensor]) -> int:
        """The number of these very gradients; waits for the device."""
        if not self._enabled or not grads:
            return 0
        return _number(_sample(grads).cpu())


def _number(sample: Tensor) -> int:
    digest = hashlib.blake2b(sample.view(torch.int32).numpy().tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 2
