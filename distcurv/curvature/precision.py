"""Keeps sketches in true float32, whatever the training job has switched on.

A sketch whose rows were rounded to TF32 or bf16 is no longer the product of one symmetric matrix:
the single-pass Nyström step then meets an indefinite core. Ranks therefore take statistics inside
`full_float32`. The settings belong to the process, so a worker's compute thread never touches them:
the refresh asks `products_are_full` and works in float64 where they are not. (Which of the two it
was shows in the last bits: for runs that must agree to the bit, set the same everywhere.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

_FULL = ("ieee", "none")  # "none": nobody has set anything

_lock = threading.Lock()
_raised = 0  # how many blocks of `full_float32` are open that had something to switch off


class _Backend(Protocol):
    fp32_precision: str


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself when it is float32 or float64, else ``x`` in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def products_are_full(device: torch.device) -> bool:
    """Whether float32 products on ``device`` are float32, by what the caller has set.

    What `full_float32` has switched on for a while in another thread does not count: it may end
    at any moment.
    """
    if torch.is_autocast_enabled(device.type):
        return False
    with _lock:
        if _raised > 0:
            return False
        try:
            return torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # see `_full_matmul`
            return _backend(device).fp32_precision in _FULL


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bf16 products (matmul and convolution) inside the block.

    The settings belong to the process: enter it from the training thread only. What the caller
    had set, through PyTorch's old or new interface, is put back.
    """
    if _nothing_to_switch_off(device):  # the usual case; the rest costs as much as a small sketch
        yield
        return
    with torch.autocast(device.type, enabled=False), _full_matmul(), _full_convolution():
        yield


def _nothing_to_switch_off(device: torch.device) -> bool:
    if torch.is_autocast_enabled(device.type):
        return False
    if device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision != "ieee":  # type: ignore[attr-defined]
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the new interface has been used, see `_full_matmul`
        return False


def _backend(device: torch.device) -> _Backend:
    # mypy reads these modules as files and misses what PyTorch puts in their place.
    cpu: _Backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return torch.backends.cuda.matmul if device.type == "cuda" else cpu


@contextmanager
def _full_matmul() -> Iterator[None]:
    global _raised
    # PyTorch has two interfaces for one setting and refuses to read the old one while they
    # disagree, which says that the caller uses the new one.
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None
    if old == "highest":
        yield
        return
    backends = [_backend(torch.device(name)) for name in ("cuda", "cpu")]
    before = [backend.fp32_precision for backend in backends]
    with _lock:
        _raised += 1
        if old is not None:
            torch.set_float32_matmul_precision("highest")
        else:
            for backend in backends:
                backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _lock:
            _raised -= 1
            if old is not None:
                torch.set_float32_matmul_precision(old)
            else:
                for backend, value in zip(backends, before, strict=True):
                    backend.fp32_precision = value


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
