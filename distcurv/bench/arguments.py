"""Types for the options of the benchmarks: a bad value becomes argparse's one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

from distcurv.errors import ConfigError


def at_least(low: int) -> Callable[[str], int]:
    """A whole number of at least ``low``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no whole number of at least {low}: give one"
            )
        return value

    return parse


def numbers(low: int) -> Callable[[str], tuple[int, ...]]:
    """Whole numbers of at least ``low``, separated by commas, none of them twice."""
    one = at_least(low)

    def parse(text: str) -> tuple[int, ...]:
        values = tuple(one(part.strip()) for part in text.split(","))
        _require_once(text, values)
        return values

    return parse


def words(choices: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Some of ``choices``, separated by commas, none of them twice."""

    def parse(text: str) -> tuple[str, ...]:
        values = tuple(part.strip() for part in text.split(","))
        for value in values:
            if value not in choices:
                raise argparse.ArgumentTypeError(
                    f"{value!r} is unknown: choose from {', '.join(choices)}"
                )
        _require_once(text, values)
        return values

    return parse


def device(name: str) -> str:
    """``name`` when this machine has that device.

    Raises:
        ConfigError: it is neither ``cpu`` nor ``cuda``, or there is no CUDA device.
    """
    import torch

    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}: use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is 'cuda': torch sees no CUDA device here, use --device cpu")
    return name


def _require_once(text: str, values: tuple[object, ...]) -> None:
    if len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names a value twice: give each one once")
