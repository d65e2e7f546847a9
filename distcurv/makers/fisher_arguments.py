"""The arguments of `NaturalGradientMaker`: Fisher types by name, and what numbers may be."""

from __future__ import annotations

import math

from distcurv.errors import ConfigError
from distcurv.makers.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE

FISHER_EXACT = "fisher_exact"
FISHER_MC = "fisher_mc"
FISHER_EMP = "fisher_emp"
FISHER_TYPES = {FISHER_EMP: "empirical", FISHER_MC: "mc", FISHER_EXACT: "exact"}


def check_arguments(
    fisher_type: str,
    loss_type: str,
    scale: float,
    grad_scale: float,
    n_mc_samples: int,
    var: float,
    seed: int | None,
) -> None:
    """Raise `ConfigError`, with the argument's name, for a value that cannot work."""
    for name, value, words in (
        ("fisher_type", fisher_type, tuple(FISHER_TYPES)),
        ("loss_type", loss_type, (LOSS_CROSS_ENTROPY, LOSS_MSE)),
    ):
        if value not in words:
            raise ConfigError(f"{name} is {value!r}: use one of {', '.join(words)}")
    for name, number in (("scale", scale), ("var", var)):
        if not (0 < number < math.inf):
            raise ConfigError(f"{name} is {number!r}: give a number > 0")
    if not math.isfinite(grad_scale) or grad_scale == 0:
        raise ConfigError(f"grad_scale is {grad_scale!r}: give a number other than 0")
    if not isinstance(n_mc_samples, int) or n_mc_samples < 1:
        raise ConfigError(f"n_mc_samples is {n_mc_samples!r}: give an integer >= 1")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise ConfigError(f"seed is {seed!r}: give an integer >= 0, or None")
