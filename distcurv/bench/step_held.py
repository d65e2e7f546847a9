"""Which tensors a method keeps alive between two steps, and where it keeps them.

All live tensors of the process are found through the garbage collector, so nothing is missed that
some object, thread or message still refers to.  Where they are kept is told by the attributes that
lead to them from the method's own objects (and by what its callbacks are bound to), else from any
object of distcurv, such as those of a service's thread; no attribute is known here by name.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ELSEWHERE = "elsewhere"
_PACKAGE = "distcurv."
_Key = tuple[torch.device, int]
_LEAVES = (str, bytes, int, float, type, ModuleType, nn.Module)


@dataclass(frozen=True)
class Held:
    """Bytes of live tensors, each storage counted once: by place, the largest first."""

    by_place: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_place.values())


def held(roots: Iterable[object], without: Iterable[Tensor], device: str) -> Held:
    """What is alive now but the tensors ``without`` (the model, the batch).

    Args:
        roots: the objects from which places are named; what none of them leads to is `ELSEWHERE`.
        device: ``cpu`` or ``cuda``; places of tensors that are not there end in " (host)".
    """
    apart = {_key(tensor) for tensor in without}
    live: dict[_Key, int] = {}
    ours: list[tuple[str, object]] = []
    # By type: isinstance would ask lazy stand-ins for their class, and load what they stand for.
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, Tensor):
            if _has_storage(thing) and _key(thing) not in apart:
                live[_key(thing)] = thing.untyped_storage().nbytes()
        elif isinstance(kind.__module__, str) and kind.__module__.startswith(_PACKAGE):
            ours.append((f"{kind.__module__.removeprefix(_PACKAGE)}.{kind.__name__}", thing))
    places = _places(("", root) for root in roots)
    for key, place in _places(ours).items() if live.keys() - places.keys() else ():
        places.setdefault(key, place)
    by_place: dict[str, int] = {}
    for key, nbytes in live.items():
        place = places.get(key, ELSEWHERE) + ("" if key[0].type == device else " (host)")
        by_place[place] = by_place.get(place, 0) + nbytes
    return Held(dict(sorted(by_place.items(), key=lambda item: -item[1])))


def _has_storage(tensor: Tensor) -> bool:
    if is_lazy(tensor):  # not made yet, and raises when it is asked
        return False
    return tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > 0


def _key(tensor: Tensor) -> _Key:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _places(roots: Iterable[tuple[str, object]]) -> dict[_Key, str]:
    """The shortest way of attributes to each storage, without underscores: ``pipeline.window``."""
    found: dict[_Key, str] = {}
    seen: set[int] = set()
    queue = deque(roots)
    while queue:
        place, thing = queue.popleft()
        if id(thing) in seen or isinstance(thing, _LEAVES):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if _has_storage(thing):
                found.setdefault(_key(thing), place)
            continue
        for name, inner in _inside(thing):
            queue.append((f"{place}.{name}".strip(".") if name else place, inner))
    return found


def _inside(thing: object) -> Iterator[tuple[str, object]]:
    """What an object or a container holds, with the attribute's or key's name where it has one."""
    named: dict[Any, Any] = {}
    if isinstance(thing, Mapping):
        named = dict(thing)
    elif isinstance(thing, tuple) and hasattr(thing, "_fields"):
        named = dict(zip(thing._fields, thing, strict=True))
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        for inner in list(thing):
            yield "", inner
    elif isinstance(thing, MethodType):
        yield "", thing.__self__
    elif isinstance(thing, partial):
        yield "", (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            yield "", cell.cell_contents
    elif hasattr(thing, "__dict__"):
        named = dict(vars(thing))
    for name, inner in named.items():
        yield name.strip("_") if isinstance(name, str) else "", inner
