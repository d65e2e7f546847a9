"""Keeps sketches in true float32, whatever the training job has switched on.

A sketch whose rows were rounded to TF32 or bf16 is no longer the product of one symmetric matrix:
the single-pass Nyström step then meets an indefinite core. Ranks therefore take statistics inside
`full_float32`. The refresh itself does not rely on it (its matrix products are float64), so a
worker's compute thread never touches these process-wide settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself when it is float32 or float64, else ``x`` in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bf16 products (matmul and convolution) inside the block.

    The settings belong to the process: enter it from the training thread only. What the caller
    had set, through PyTorch's old or new interface, is put back.
    """
    with torch.autocast(device.type, enabled=False), _full_matmul(), _full_convolution():
        yield


@contextmanager
def _full_matmul() -> Iterator[None]:
    # PyTorch has two interfaces for one setting and refuses to read the old one while they
    # disagree, which says that the caller uses the new one.
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        # mypy reads these modules as files and misses what PyTorch puts in their place.
        cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        backends = (torch.backends.cuda.matmul, cpu)
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
        return
    if old == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)


@contextmanager
def _full_convolution() -> Iterator[None]:
    backend = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = backend.fp32_precision
    if before == "ieee":
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
