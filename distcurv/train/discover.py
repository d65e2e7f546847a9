"""Which parameters of a model become blocks, and for every other trainable one the reason why not.

Nothing is skipped without a word: each trainable parameter is part of a block or listed as
uncovered (it is then left to the base optimizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distcurv.errors import ConfigError
from distcurv.layers import find_layer
from distcurv.layers.bare import AnyLayer, BareIO
from distcurv.layers.column import Whole
from distcurv.train.block_parts import Part, Source, module_parts

Ignored = nn.Module | type[nn.Module] | str

COMPILED = "_orig_mod"  # what `torch.compile(module)` wraps, in the wrapper


class FoundLayer(NamedTuple):
    """A block: parameters of a module, under the name it has in the bare model.

    Attributes:
        source: where its statistics come from: the ``module``'s forward and backward, function
            ``calls`` with its parameters, or its ``gradient``.
        tied: further modules with the same weight, see `Watched`.
    """

    name: str
    module: nn.Module
    layer: AnyLayer | Whole
    source: Source = "module"
    tied: tuple[nn.Module, ...] = ()


class Uncovered(NamedTuple):
    """A module or parameter that is no block, and why."""

    name: str
    reason: str


class _Candidate(NamedTuple):
    name: str
    module: nn.Module
    part: Part
    weight: Tensor


def bare_model(model: nn.Module) -> nn.Module:
    """The user's model inside DistributedDataParallel, DataParallel or `torch.compile`'s wrapper,
    so that names carry no ``module.`` and no ``_orig_mod.``"""
    while True:
        compiled = model._modules.get(COMPILED)
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif compiled is not None:
            model = compiled
        else:
            return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with the names that they have where nothing is compiled; no wrappers."""
    for name, module in model.named_modules():
        if COMPILED not in module._modules:
            yield plain_name(name), module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters with the names that they have where nothing is compiled."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def parameter_places(model: nn.Module | None) -> list[tuple[nn.Module, str]]:
    """Every place of a parameter: the module and the name in it; none without a model.

    (TorchScript modules do not tell.)"""
    modules = () if model is None else model.modules()
    told = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    return [(m, name) for m in told for name, p in m._parameters.items() if p is not None]


def plain_name(name: str) -> str:
    """A dotted name without what `torch.compile`'s wrappers put in between."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def find_layer_blocks(
    model: nn.Module, ignore_modules: Sequence[Ignored] = ()
) -> tuple[list[FoundLayer], list[Uncovered]]:
    """Split the model's parameters into blocks and uncovered ones, in the model's order.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        ignore_modules: what to leave out, with all it contains: modules, classes of modules, or
            parts of module names (``"head"`` leaves out ``decoder.head``).

    A module that sits in the model at two places appears once, under its first name.  A weight
    that several modules share is one block, of the first module that sees it as a matrix of
    outputs and inputs.  Raises `ConfigError` for an unusable ``ignore_modules``.
    """
    model = bare_model(model)
    ignored = ignored_ids(model, ignore_modules)
    uncovered: list[Uncovered] = []
    candidates: list[_Candidate] = []
    tied = {id(p) for p, names in _owners(model).values() if len(names) > 1}
    for name, module in named_modules(model):
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        shown = name or type(module).__name__
        if id(module) in ignored:
            uncovered.append(Uncovered(shown, "ignored by ignore_modules"))
            continue
        if isinstance(module, torch.jit.ScriptModule):
            uncovered.append(Uncovered(shown, "it is a TorchScript module, which runs no hooks"))
            continue
        for part in module_parts(module, find_layer(module), tied):
            own_name = ".".join(filter(None, (name, part.name))) or shown
            if part.refusal is not None:
                text = part.refusal if part.name else f"{type(module).__name__}: {part.refusal}"
                uncovered.append(Uncovered(own_name, text))
                continue
            weight = module.get_parameter(part.layer.parameter_names(module)[0])
            candidates.append(_Candidate(own_name, module, part, weight))
    found = list(_blocks(candidates, uncovered))
    return found, uncovered


def _blocks(candidates: Sequence[_Candidate], uncovered: list[Uncovered]) -> Iterator[FoundLayer]:
    """One block for each weight (or rows of one)."""
    sharing: dict[tuple[int, object], list[_Candidate]] = {}
    for candidate in candidates:
        key = (id(candidate.weight), candidate.part.layer.rows)
        sharing.setdefault(key, []).append(candidate)
    for candidate in candidates:
        group = sharing[id(candidate.weight), candidate.part.layer.rows]
        first = min(group, key=_preference)
        if candidate is not first:
            continue
        rest = [other for other in group if other is not first]
        odd = [other for other in rest if not _fits(first, other)]
        if odd:
            yield from _by_gradient(group, first, uncovered)
            continue
        part = first.part
        modules = tuple(other.module for other in rest if other.module is not first.module)
        yield FoundLayer(first.name, first.module, part.layer, part.source, modules)


def _by_gradient(
    group: Sequence[_Candidate], first: _Candidate, uncovered: list[Uncovered]
) -> Iterator[FoundLayer]:
    """A parameter that modules use in different ways: only its gradient knows of all of them."""
    layers = [one.part.layer for one in group]
    if all(
        layer.rows is None and len(layer.parameter_names(one.module)) == 1
        for layer, one in zip(layers, group, strict=True)
    ):
        layer = first.part.layer
        is_matrix = layer.one_sided is None and layer.weight_is_matrix
        seen = layer if is_matrix else BareIO(layer.weight)
        yield FoundLayer(first.name, first.module, seen, "gradient")
        return
    names = " = ".join(one.name for one in group)
    types = ", ".join(sorted({type(one.module).__name__ for one in group}))
    reason = f"its parameter is shared ({names}) by modules that use it differently ({types})"
    uncovered.extend(Uncovered(one.name, reason) for one in group)


def _preference(candidate: _Candidate) -> int:
    """A tied weight is the block of a module of outputs and inputs before that of an embedding."""
    layer = candidate.part.layer
    return 0 if layer.one_sided is None and not layer.diagonal_sides else 1


def _fits(first: _Candidate, other: _Candidate) -> bool:
    """Whether another module's use of the weight can be captured with the first one's layout."""
    if first.part.source != other.part.source:
        return False
    if type(first.module) is type(other.module):
        return True
    return isinstance(other.module, nn.Embedding) and first.part.layer.weight_is_matrix


def _check_ignored(ignore_modules: Sequence[object]) -> None:
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


def ignored_ids(model: nn.Module, ignore_modules: Sequence[object]) -> set[int]:
    """The ids of the modules that ``ignore_modules`` names, with all that they contain.

    Raises `ConfigError` for unusable ones."""
    _check_ignored(ignore_modules)
    texts = [item for item in ignore_modules if isinstance(item, str)]
    classes = tuple(item for item in ignore_modules if isinstance(item, type))
    instances = {id(item) for item in ignore_modules if isinstance(item, nn.Module)}
    ignored: set[int] = set()
    for name, module in model.named_modules():
        if (
            id(module) in instances
            or isinstance(module, classes)
            or any(text in plain_name(name) for text in texts)
        ):
            ignored.update(id(inner) for inner in module.modules())
    return ignored


def _owners(model: nn.Module) -> dict[int, tuple[Tensor, list[str]]]:
    """Each parameter and its full names, by id; a module counts once."""
    owners: dict[int, tuple[Tensor, list[str]]] = {}
    for name, module in named_modules(model):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{name}.{key}" if name else key
            owners.setdefault(id(parameter), (parameter, []))[1].append(full)
    return owners
