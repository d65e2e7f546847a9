"""Watches the functions of `FUNCTIONS` while capture is armed, by the identity of the weight.

The functions are replaced where they are looked up: in torch's own namespaces, and in the
namespaces of the modules that define the watched models' classes (or their bases) and may have
imported them by name.  A call whose weight is no watched block's goes straight on.  `restore` puts
everything back.

A weight counts as a block's when it is the parameter, or a view of rows of it
(`nn.MultiheadAttention` splits ``in_proj_weight``).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from distcurv.layers.functions import FUNCTIONS, FunctionCall
from distcurv.layers.sequence_first import SequenceFirst
from distcurv.train.captured_block import CapturedBlock
from distcurv.train.uses import Use

# Told of every use: the block, how, the call's input and its output.
Observer = Callable[[CapturedBlock, Use, Tensor, Tensor], None]


class FunctionWatch:
    """What is replaced, and what was there before.

    Args:
        blocks: those that are captured where functions use them.
        observer: is told of every use.
    """

    def __init__(self, blocks: Iterable[CapturedBlock], observer: Observer) -> None:
        self._blocks = list(blocks)
        self._observer = observer
        self._replaced: list[tuple[Any, str, object]] = []
        self._attention = threading.local()  # the samples of the attention that runs

    def install(self) -> None:
        """Begin to watch; nothing is replaced where there is nothing to watch."""
        if not self._blocks:
            return
        wrappers: dict[int, Callable[..., Any]] = {}
        for namespace, name, read in FUNCTIONS:
            function = vars(namespace)[name]
            if id(function) not in wrappers:
                wrappers[id(function)] = self._wrapper(function, read)
            self._replace(namespace, name, wrappers[id(function)])
        attention = F.multi_head_attention_forward
        wrappers[id(attention)] = self._attention_wrapper(attention)
        self._replace(F, "multi_head_attention_forward", wrappers[id(attention)])
        for namespace in self._user_namespaces():
            for name, value in list(vars(namespace).items()):
                wrapper = wrappers.get(id(value))
                if wrapper is not None:
                    self._replace(namespace, name, wrapper)

    def restore(self) -> None:
        """Put back what was there; idempotent."""
        while self._replaced:
            namespace, name, function = self._replaced.pop()
            setattr(namespace, name, function)

    def _user_namespaces(self) -> list[Any]:
        types = {base for block in self._blocks for base in type(block.module).__mro__}
        names = {base.__module__ for base in types if base not in nn.Module.__mro__}
        own = {id(namespace) for namespace, _, _ in FUNCTIONS}
        found = [sys.modules[name] for name in sorted(names) if name in sys.modules]
        return [namespace for namespace in found if id(namespace) not in own]

    def _replace(self, namespace: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._replaced.append((namespace, name, vars(namespace)[name]))
        setattr(namespace, name, wrapper)

    def _wrapper(
        self, function: Callable[..., Any], read: Callable[..., FunctionCall]
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            if self._replaced and isinstance(output, Tensor) and output.requires_grad:
                self._look(read(*args, **kwargs), output)
            return output

        return watched

    def _attention_wrapper(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(query: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = getattr(self._attention, "samples", None)
            self._attention.samples = query.shape[1] if query.dim() == 3 else 1
            try:
                return function(query, *args, **kwargs)
            finally:
                self._attention.samples = before

        return watched

    def _look(self, call: FunctionCall, output: Tensor) -> None:
        for block in self._blocks:
            parameter = block.module._parameters.get(block.layer.weight)
            if parameter is None:
                continue
            columns = _columns(call.weight, parameter, block.layer.rows)
            if columns is None:
                continue
            use = self._use(block, call, columns)
            if use is not None:
                self._observer(block, use, call.input, output)

    def _use(
        self, block: CapturedBlock, call: FunctionCall, columns: tuple[int, int]
    ) -> Use | None:
        """How the call uses the block; None where its layer does not know such a call."""
        if call.kind == "linear" and block.layer.call_kind == "linear":
            samples = getattr(self._attention, "samples", None)
            how = nn.Identity() if samples is None else SequenceFirst(samples)
            return block.use(how, None if columns == (0, len(call.weight)) else columns)
        if call.kind == "embedding" and block.layer.call_kind == "linear":
            return block.embedding_use(call.padding_idx)
        if call.kind == "conv" and block.layer.call_kind == "conv":
            return block.use(call.how)
        return None


def _columns(
    weight: Tensor, parameter: Tensor, rows: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The rows of ``weight`` that are the block's ``rows`` of the parameter; None where it is
    another tensor or has not all of them."""
    if weight is parameter:
        first = 0
    elif (
        weight._is_view()
        and weight._base is parameter
        and weight.shape[1:] == parameter.shape[1:]
        and weight.stride() == parameter.stride()
    ):
        offset = int(weight.storage_offset()) - int(parameter.storage_offset())
        first, rest = divmod(offset, parameter.stride(0))
        if rest:
            return None
    else:
        return None
    start, stop = rows if rows is not None else (0, len(parameter))
    if start < first or stop > first + len(weight):
        return None
    return start - first, stop - first
