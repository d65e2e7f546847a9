"""Which modules of a model become blocks, and for every other trainable one the reason why not.

Nothing is skipped without a word: each module that owns a trainable parameter is either found or
listed as uncovered (its parameters are then left to the base optimizer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distcurv.errors import ConfigError
from distcurv.layers import find_layer
from distcurv.layers.layer import LayerIO

Ignored = nn.Module | type[nn.Module] | str


class FoundLayer(NamedTuple):
    """A module that can be a block, under the name it has in the bare model."""

    name: str
    module: nn.Module
    layer: LayerIO


class Uncovered(NamedTuple):
    """A module with trainable parameters of its own that is no block, and why."""

    name: str
    reason: str


def bare_model(model: nn.Module) -> nn.Module:
    """The user's model inside DistributedDataParallel or DataParallel, so that names carry no
    ``module.``"""
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    return model


def find_layer_blocks(
    model: nn.Module, ignore_modules: Sequence[Ignored] = ()
) -> tuple[list[FoundLayer], list[Uncovered]]:
    """Split the model's modules into blocks and uncovered ones, in the model's order.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        ignore_modules: what to leave out, with all it contains: modules, classes of modules, or
            parts of module names (``"head"`` leaves out ``decoder.head``).

    A module that sits in the model at two places appears once, under its first name.  A parameter
    that several modules share makes all of them uncovered: one module's statistics would stand
    for the gradient of all.  Raises `ConfigError` for an unusable ``ignore_modules``.
    """
    _check_ignored(ignore_modules)
    model = bare_model(model)
    ignored = _ignored_ids(model, ignore_modules)
    owners = _owners(model)
    found: list[FoundLayer] = []
    uncovered: list[Uncovered] = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        name = name or type(module).__name__
        tied = next((owners[id(p)] for p in own if len(owners[id(p)]) > 1), None)
        layer = find_layer(module)
        if id(module) in ignored:
            uncovered.append(Uncovered(name, "ignored by ignore_modules"))
        elif layer is None:
            uncovered.append(Uncovered(name, f"no layer is registered for {_type_name(module)}"))
        elif tied is not None:
            shared = " = ".join(tied)
            reason = f"its parameter is shared ({shared}), which comes in a later version"
            uncovered.append(Uncovered(name, reason))
        elif (refusal := layer.refuse(module)) is not None:
            uncovered.append(Uncovered(name, f"{_type_name(module)}: {refusal}"))
        else:
            found.append(FoundLayer(name, module, layer))
    return found, uncovered


def _check_ignored(ignore_modules: Sequence[Ignored]) -> None:
    if isinstance(ignore_modules, str):
        raise ConfigError(f"ignore_modules is the string {ignore_modules!r}: give a list")
    for item in ignore_modules:
        is_class = isinstance(item, type) and issubclass(item, nn.Module)
        if not is_class and not isinstance(item, nn.Module | str):
            raise ConfigError(
                f"ignore_modules has {item!r}: give modules, classes of modules or parts of names"
            )
        if item == "":
            raise ConfigError("ignore_modules has an empty string: it would match every module")


def _ignored_ids(model: nn.Module, ignore_modules: Sequence[Ignored]) -> set[int]:
    texts = [item for item in ignore_modules if isinstance(item, str)]
    classes = tuple(item for item in ignore_modules if isinstance(item, type))
    instances = {id(item) for item in ignore_modules if isinstance(item, nn.Module)}
    ignored: set[int] = set()
    for name, module in model.named_modules():
        if (
            id(module) in instances
            or isinstance(module, classes)
            or any(text in name for text in texts)
        ):
            ignored.update(id(inner) for inner in module.modules())
    return ignored


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Full names of each parameter, by the id of the parameter; a module counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def _type_name(module: nn.Module) -> str:
    return type(module).__name__
