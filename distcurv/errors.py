"""What can go wrong, by name, so that callers can catch one failure and not another.

Every message says what was wrong, in which object, with which value, and what to do.
This module imports nothing of ours: every layer of the package may raise from here.
"""

from __future__ import annotations


class DistcurvError(Exception):
    """Base of every error that distcurv raises on purpose."""


class ConfigError(DistcurvError, ValueError):
    """A setting has a value that cannot work (raised when the config is made, not later)."""


class ShapeError(DistcurvError, ValueError):
    """A tensor has the wrong shape, dtype or device for the place it was handed to."""


class UnsupportedModuleError(DistcurvError, TypeError):
    """A module, or a variant of it, cannot be captured."""


class CaptureError(DistcurvError, RuntimeError):
    """Statistics could not be captured, e.g. ``mc`` without a call of ``sample``."""


class NumericsError(DistcurvError, ArithmeticError):
    """A factorisation failed in float32 and in float64, or gave non-finite numbers."""


class ProtocolError(DistcurvError):
    """Bytes that came over a link are no valid message.  ``code`` is a short stable word."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class LinkError(DistcurvError, RuntimeError):
    """A link was used wrongly: after close, or from a thread that does not own it."""


class EndpointError(DistcurvError, ValueError):
    """An endpoint string is malformed, or may not be bound without keys."""


class LaunchError(DistcurvError, RuntimeError):
    """A process could not be started, or was not ready in time."""


class MismatchError(DistcurvError, RuntimeError):
    """The training ranks disagree (step, block table, gradients, settings); raised on all."""


class StateError(DistcurvError, RuntimeError):
    """An object was used in the wrong order: after close, or with a foreign state_dict."""
