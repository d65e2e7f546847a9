"""NaturalGradientMaker by the name of its shape or Fisher type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from distcurv.makers.fisher_arguments import FISHER_EMP, FISHER_MC
from distcurv.makers.natural_gradient import NaturalGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.shapes import (
    SHAPE_DIAG,
    SHAPE_FULL,
    SHAPE_KFE,
    SHAPE_LAYER_WISE,
    SHAPE_UNIT_WISE,
    Rule,
)


class FullNaturalGradientMaker(NaturalGradientMaker):
    """One matrix for all parameters; the other arguments are those of `NaturalGradientMaker`."""

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        **options: Any,
    ) -> None:
        super().__init__(model, config, fisher_type, SHAPE_FULL, **options)


class LayerWiseNaturalGradientMaker(NaturalGradientMaker):
    """A matrix for each layer; the other arguments are those of `NaturalGradientMaker`."""

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        **options: Any,
    ) -> None:
        super().__init__(model, config, fisher_type, SHAPE_LAYER_WISE, **options)


class UnitWiseNaturalGradientMaker(NaturalGradientMaker):
    """A matrix for each unit; the other arguments are those of `NaturalGradientMaker`."""

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        **options: Any,
    ) -> None:
        super().__init__(model, config, fisher_type, SHAPE_UNIT_WISE, **options)


class DiagNaturalGradientMaker(NaturalGradientMaker):
    """The diagonal; the other arguments are those of `NaturalGradientMaker`."""

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        **options: Any,
    ) -> None:
        super().__init__(model, config, fisher_type, SHAPE_DIAG, **options)


class EmpNaturalGradientMaker(NaturalGradientMaker):
    """The data's targets, ``fisher_emp``; the other arguments are those of
    `NaturalGradientMaker`."""

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_shape: str | Sequence[Rule] = SHAPE_FULL,
        **options: Any,
    ) -> None:
        super().__init__(model, config, FISHER_EMP, fisher_shape, **options)


class EkfacGradientMaker(NaturalGradientMaker):
    """Second moments in the Kronecker factors' eigenbasis (George et al. 2018, "Fast Approximate
    Natural Gradient Descent in a Kronecker-factored Eigenbasis"); the other arguments are those of
    `NaturalGradientMaker`."""

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        **options: Any,
    ) -> None:
        super().__init__(model, config, fisher_type, SHAPE_KFE, **options)
