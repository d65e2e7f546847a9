"""How many terms the loss of a micro-batch counted: told between its forward and its backward.

A ``mean`` over tokens divides by their number, of which the masked are no part; the layers see
neither.  So the loop tells it, and it holds for all calls of that micro-batch: those of its
forward, and those that a reentrant checkpoint makes only within the backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distcurv.errors import CaptureError, ConfigError

Terms = int | float | Tensor


@dataclass(eq=False)
class MicroBatch:
    """One forward and what follows it.

    Attributes:
        terms: M, the number of terms that the loss counted, None: not told.
        divisor: what the loss was divided by.
        samples: the most that any of its calls had.
        ran: whether a forward belongs to it, since M was told where it was.
        ended: whether a gradient has reached one of its calls.
    """

    terms: Terms | None = None
    divisor: Terms | None = None
    samples: int = 0
    ran: bool = False
    ended: bool = False
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def told(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(terms, divisor), without a dimension and in float32 on the device; None: not told."""
        if self.terms is None or self.divisor is None:
            return None
        if device not in self._on_device:
            self._on_device[device] = (
                on_device(self.terms, device),
                on_device(self.divisor, device),
            )
        return self._on_device[device]


class MicroBatches:
    """Which micro-batch a forward, a number of terms and a gradient belong to."""

    def __init__(self) -> None:
        self._current = MicroBatch()
        self._ended: list[MicroBatch] = []

    def of_forward(self, *, with_graph: bool) -> MicroBatch:
        """A block is used.

        Inside a backward it is a checkpoint's recomputation, which belongs to the micro-batch
        whose backward it is.  Else a new micro-batch begins after the backward of the last one,
        or where M has been told already; but not with a forward without a graph (of a teacher, an
        evaluation) before the backward."""
        if inside_backward():
            return self._current
        if self._current.ended or (self._current.terms is not None and with_graph):
            self._current = MicroBatch()
        self._current.ran = True
        return self._current

    def tell(self, terms: Terms, divisor: Terms | None) -> None:
        """M of the current micro-batch.

        Raises `ConfigError` for what is no number, `CaptureError` where there is no micro-batch
        between its forward and its backward, or where M has been told."""
        check_terms("terms", terms)
        if divisor is not None:
            check_terms("divisor", divisor)
        current = self._current
        if inside_backward():
            wrong = "during a backward"
        elif current.ended:
            wrong = "after the backward"
        elif not current.ran:
            wrong = "before any forward" if current.terms is None else "twice"
        else:
            if current.terms is not None:
                self._current = current = MicroBatch()
            current.terms = terms
            current.divisor = terms if divisor is None else divisor
            current.ran = False
            return
        raise CaptureError(
            f"the number of loss terms was told {wrong}: tell it once for each micro-batch, "
            "between its forward and its backward()"
        )

    def tell_head(self, terms: Tensor) -> None:
        """M of one of the losses that are added up; the largest counts."""
        current = self._current
        current.terms = terms if current.terms is None else torch.maximum(current.terms, terms)  # type: ignore[arg-type]
        current.divisor = current.terms
        current._on_device.clear()

    def end(self, micro_batch: MicroBatch) -> None:
        """A gradient has reached one of its calls."""
        if not micro_batch.ended:
            micro_batch.ended = True
            self._ended.append(micro_batch)

    def total(self) -> Terms | None:
        """The terms of all that have ended; samples count where terms were not told.  None where
        none has ended: no call has shown anything."""
        if not self._ended:
            return None
        total: Terms = 0
        for micro_batch in self._ended:
            total = total + (
                micro_batch.samples if micro_batch.terms is None else micro_batch.terms
            )
        return total


def inside_backward() -> bool:
    """Whether this thread runs a backward now."""
    return torch._C._current_graph_task_id() != -1


def on_device(terms: Terms, device: torch.device) -> Tensor:
    """A number of terms without a dimension, in float32."""
    if isinstance(terms, Tensor):
        return terms.detach().to(device, torch.float32, non_blocking=True)
    return torch.full((), float(terms), device=device)


def check_terms(what: str, terms: object) -> None:
    """Raises `ConfigError` unless it is a number >= 0 or a tensor without a dimension (whose value
    is not looked at: that would wait for the device)."""
    if isinstance(terms, Tensor):
        if terms.dim() == 0 and not terms.is_complex():
            return
        got = f"a tensor of shape {tuple(terms.shape)} and {terms.dtype}"
    else:
        if isinstance(terms, int | float) and not isinstance(terms, bool) and 0 <= terms < 2**63:
            return
        got = repr(terms)
    raise ConfigError(
        f"{what} is {got}: give a number >= 0, or a real tensor without a dimension (mask.sum())"
    )
