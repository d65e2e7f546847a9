"""Shapes of the Fisher matrix: which blocks they make, and which module gets which.

A shape is one line in `SHAPES`.  What is unit-wise or diagonal by nature (norms, bare parameters)
stays so under the shapes that say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from distcurv.errors import ConfigError
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.train.discover import FoundLayer

SHAPE_FULL = "full"
SHAPE_LAYER_WISE = "layer_wise"
SHAPE_KRON = "kron"
SHAPE_KRON_DENSE = "kron_dense"
SHAPE_KRON_EIGEN = "kron_eigen"
SHAPE_SWIFT_KRON = "swift_kron"
SHAPE_KFE = "kfe"
SHAPE_UNIT_WISE = "unit_wise"
SHAPE_DIAG = "diag"

TWO_SIDED = "two_sided"  # what a Linear or a convolution is
Rule = str | tuple[object, str]


@dataclass(frozen=True)
class Shape:
    """How a shape is served.

    Attributes:
        settings: what `KfacConfig.overrides` say of a block.
        natures: of which blocks: ``two_sided``, or what a block is by nature: ``unitwise``,
            ``diagonal``.
        in_step: computed on the ranks, not by the service, where a block has two sides.
    """

    settings: Callable[[PreconditioningConfig], Mapping[str, object]]
    natures: frozenset[str]
    in_step: bool = False


def _kronecker(config: PreconditioningConfig) -> Mapping[str, object]:
    if config.rank is None:
        return {"kind": "dense"}
    return {"kind": "lowrank", "rank": config.rank}


def _dense(config: PreconditioningConfig) -> Mapping[str, object]:
    return {"kind": "dense"}


def _eigen(config: PreconditioningConfig) -> Mapping[str, object]:
    # At full rank the kind ``lowrank`` is the exact eigendecomposition.
    return {"kind": "lowrank", "rank": 1 << 30, "encoding": "dense"}


def _of_kind(kind: str) -> Callable[[PreconditioningConfig], Mapping[str, object]]:
    return lambda config: {"kind": kind}


_ANY = frozenset({TWO_SIDED, "unitwise", "diagonal"})

# ``kron`` goes by ``PreconditioningConfig.rank``; ``kron_dense`` and ``kron_eigen`` do not read it.
SHAPES: dict[str, Shape] = {
    SHAPE_KRON: Shape(_kronecker, _ANY),
    SHAPE_KRON_DENSE: Shape(_dense, _ANY),
    SHAPE_KRON_EIGEN: Shape(_eigen, _ANY),
    SHAPE_SWIFT_KRON: Shape(_kronecker, _ANY, in_step=True),
    SHAPE_KFE: Shape(_of_kind("kfe"), _ANY),
    SHAPE_UNIT_WISE: Shape(_of_kind("unit_rows"), _ANY),
    SHAPE_DIAG: Shape(_of_kind("diagonal"), _ANY),
    SHAPE_LAYER_WISE: Shape(_of_kind("layer_wise"), _ANY),
    SHAPE_FULL: Shape(_of_kind("full"), _ANY),
}


class Assignment:
    """Which shape a module has.

    Args:
        rules: a shape, or a list of shapes and of pairs (instance | name | class, shape).  An
            instance counts before a name (a part of the module's name), a name before a class,
            earlier rules before later ones, and a shape alone is for all others; where there is
            none, they are left to the base optimizer.

    Raises `ConfigError` for another form or an unknown shape.
    """

    def __init__(self, rules: str | Sequence[Rule]) -> None:
        self._default: str | None = None
        self._pairs: list[tuple[object, str]] = []
        for rule in [rules] if isinstance(rules, str) else rules:
            if isinstance(rule, str):
                if self._default is not None:
                    raise ConfigError(
                        f"fisher_shape has {self._default!r} and {rule!r} for all modules: give one"
                    )
                self._default = _known(rule)
                continue
            if not isinstance(rule, tuple) or len(rule) != 2:
                raise ConfigError(
                    f"fisher_shape has {rule!r}: give a shape, or a pair (module, part of a name "
                    "or class, shape)"
                )
            key, shape = rule
            if not isinstance(key, nn.Module | str) and not (
                isinstance(key, type) and issubclass(key, nn.Module)
            ):
                raise ConfigError(
                    f"fisher_shape has a rule for {key!r}: give a module, a part of a name or a "
                    "class of modules"
                )
            if any(key is other for other, _ in self._pairs):
                raise ConfigError(f"fisher_shape has two rules for {key!r}: give one")
            self._pairs.append((key, _known(shape)))

    @property
    def names(self) -> list[str]:
        """The shapes that the rules name."""
        return [*([self._default] if self._default else []), *(shape for _, shape in self._pairs)]

    def of(self, name: str, module: object) -> str | None:
        """A module's shape."""
        for key, shape in self._pairs:
            if key is module:
                return shape
        for key, shape in self._pairs:
            if isinstance(key, str) and key in name:
                return shape
        for key, shape in self._pairs:
            if isinstance(key, type) and isinstance(module, key):
                return shape
        return self._default

    def check(self, model: nn.Module, found: Sequence[FoundLayer]) -> None:
        """Raise `ConfigError` where a block cannot have the shape that it is assigned, and for an
        instance that a rule names in vain: one of another model, or with layers inside.

        Args:
            found: the model's blocks."""
        blocks = {id(layer.module) for layer in found}
        modules = {id(module) for module in model.modules()}
        for key, shape in self._pairs:
            if not isinstance(key, nn.Module):
                continue
            inside = any(id(m) in blocks for m in key.modules() if m is not key)
            if id(key) not in modules or (inside and id(key) not in blocks):
                what = "has layers inside" if id(key) in modules else "is not in the model"
                raise ConfigError(
                    f"fisher_shape has a rule ({shape!r}) for a {type(key).__name__} that {what}: "
                    "give the layer itself, or a part of its name"
                )
        for layer in found:
            name = self.of(layer.name, layer.module)
            if name is None:
                continue
            nature = layer.layer.one_sided or TWO_SIDED
            if nature not in SHAPES[name].natures:
                fits = [other for other, shape in SHAPES.items() if nature in shape.natures]
                raise ConfigError(
                    f"the Fisher shape {name!r} is not for {layer.name} "
                    f"({type(layer.module).__name__}): use {', '.join(fits)}, or ignore_modules"
                )

    def __repr__(self) -> str:
        pairs = [
            (key.__qualname__ if isinstance(key, type) else key, shape)
            for key, shape in self._pairs
            if not isinstance(key, nn.Module)
        ]
        return f"Assignment({self._default!r}, {pairs!r})"


@dataclass(frozen=True)
class Assigned:
    """Chooses the blocks of a shape, for `KfacConfig.overrides`; None: those without one."""

    assignment: Assignment
    shape: str | None

    def __call__(self, name: str, module: object) -> bool:
        return self.assignment.of(name, module) == self.shape


def _known(shape: object) -> str:
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ConfigError(f"the Fisher shape {shape!r} is unknown: use one of {', '.join(SHAPES)}")
    return shape
