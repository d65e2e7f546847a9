"""Settings that may change with the step: numbers, or pure functions of the step.

A function is called anew whenever its value is needed, on every rank by itself.  It must depend on
nothing but the step: then all ranks get one value, and a resumed run goes on where it was.  The
values are compared over the ranks at every sync point (`distcurv.train.pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from functools import partial

from distcurv.errors import ConfigError

Schedule = Callable[[int], float]  # of the training step, counted from 0
IntervalSchedule = Callable[[int], int]


def value_at(
    value: object, step: int, name: str, ok: Callable[[object], bool], want: str
) -> float | int:
    """The number that a setting is at a step.

    Args:
        value: a number or a function of the step.
        step: the training step, counted from 0.
        name: of the setting, for the error, e.g. ``KfacConfig.damping``.
        ok: whether a number can work.
        want: what to do where it cannot.

    Raises `ConfigError` with the step and the value where it is no number that can work; what the
    function itself raises is raised.
    """
    number = value(step) if callable(value) else value
    if not ok(number):
        when = f" at step {step}" if callable(value) else ""
        raise ConfigError(f"{name}{when} is {number!r}: {want}")
    assert isinstance(number, int | float)
    return number


def description(value: object) -> str:
    """A setting in words that are the same in every process that was given the same setting.

    As ``repr``, but callables go by their names, whose ``repr`` has an address in it, and sets are
    sorted, whose order differs between processes."""
    if isinstance(value, partial):
        inner = (value.func, *value.args, value.keywords)
        return f"partial({', '.join(description(part) for part in inner)})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        parts = (f"{f.name}={description(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        pairs = (f"{description(k)}: {description(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(description(part) for part in value))}}}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"({', '.join(description(part) for part in value)})"
    if type(value).__repr__ is object.__repr__:
        return f"an instance of {description(type(value))}"
    return repr(value)
