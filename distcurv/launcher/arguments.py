"""Types of command-line values; each refuses a bad one with a sentence that names it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable


def count_from(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` up."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from {least} up")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """A duration, 0 or more."""
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of seconds, e.g. 3")
    return float(text)


def device(text: str) -> str:
    """A torch device by name; whether it is there is found out by the process that uses it."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be cpu, cuda or cuda:N")
    return text


def devices(text: str) -> list[str]:
    """One device or several with commas between."""
    return [device(part) for part in text.split(",")]
