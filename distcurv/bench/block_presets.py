"""Weight matrices of known models, as lists of shapes: what `bench bytes` counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distcurv.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """``count`` weights of Do×Di."""

    name: str
    out: int
    into: int
    count: int = 1


_AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def _charlm(width: int, layers: int, vocabulary: int, context: int) -> list[Shape]:
    return [
        Shape("token", vocabulary, width),
        Shape("position", context, width),
        Shape("attention", width, width, 4 * layers),
        Shape("mlp up", 4 * width, width, layers),
        Shape("mlp down", width, 4 * width, layers),
        Shape("head", vocabulary, width),
    ]


# autoencoder and charlm are the models of `bench step`; of BERT-Large (Devlin et al. 2019) the 24
# encoder layers of width 1024.
PRESETS: Mapping[str, Sequence[Shape]] = {
    "autoencoder": [Shape(f"{into}-{out}", out, into) for into, out in pairwise(_AUTOENCODER)],
    "charlm": _charlm(256, 4, 97, 64),
    "bert-large": [
        Shape("attention", 1024, 1024, 96),
        Shape("mlp up", 4096, 1024, 24),
        Shape("mlp down", 1024, 4096, 24),
    ],
}


def parse_shapes(text: str) -> list[Shape]:
    """``1000x784,500x1000*3``: Do x Di, and how often.

    Raises:
        ConfigError: the text is not of this form.
    """
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)(?:\*([1-9]\d*))?\s*", part)
        if match is None:
            raise ConfigError(
                f"--shapes has {part!r}: write Do x Di and maybe how often, as in 1000x784,64x64*3"
            )
        out, into, count = (int(group or 1) for group in match.groups())
        shapes.append(Shape(f"{out}x{into}", out, into, count))
    return shapes
