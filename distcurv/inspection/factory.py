"""Builds the model that a ``module:factory`` on the command line stands for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from typing import Any

import torch
from torch import nn

from distcurv.errors import ConfigError


def build(path: str, *, meta: bool) -> nn.Module:
    """The model: what the factory returns when it is called without arguments.

    Args:
        path: ``module:factory``; the module is looked for in the current directory too, the
            factory may be a function, a class, an attribute of one, or a model itself.
        meta: build it on the device ``meta``, where parameters have shapes but no memory.

    Raises `ConfigError` for a path that leads nowhere, a factory that needs arguments, or one that
    returns no module.  What the user's own code raises is raised as it is."""
    factory = _find(path)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ConfigError(f"{path} is {factory!r}: give a function or class that makes a model")
    _check_takes_nothing(path, factory)
    with torch.device("meta" if meta else "cpu"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{path} returned {type(model).__name__}: it must return a torch.nn.Module"
        )
    return model


def _find(path: str) -> Any:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{path!r} is no module:factory: give e.g. package.models:make_model")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails within the module is the user's own to see.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"there is no module {module_name!r}: looked in {here} and on Python's path"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"{path}: {found!r} has no {name!r}")
        found = getattr(found, name)
    return found


def _check_takes_nothing(path: str, factory: Any) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:
        return  # of some built-ins nothing is known: calling it will tell
    try:
        signature.bind()
    except TypeError as error:
        raise ConfigError(
            f"{path}{signature} needs arguments: wrap it in a function that takes none"
        ) from error
