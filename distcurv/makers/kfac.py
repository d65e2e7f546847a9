"""KfacGradientMaker: the natural gradient with a Kronecker-factored Fisher matrix."""

from __future__ import annotations

from torch import nn

from distcurv.errors import ConfigError
from distcurv.makers.fisher_arguments import FISHER_MC
from distcurv.makers.grad_maker import LOSS_CROSS_ENTROPY
from distcurv.makers.natural_gradient import NaturalGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.shapes import SHAPE_KRON, SHAPE_KRON_EIGEN, SHAPE_SWIFT_KRON


class KfacGradientMaker(NaturalGradientMaker):
    """K-FAC (Martens and Grosse 2015; of convolutions Grosse and Martens 2016).

    Dense factors, or of low rank with ``config.rank``.  Norms get a 2 x 2 matrix for each unit.

    Args:
        swift: SKFAC (Tang et al. 2021): a side with fewer rows in the batch than dimensions is
            inverted by its rows, within the step.  The result is that of dense factors.
        eigen: factors as eigendecompositions of full rank: refreshes need no damping, which may
            change between two steps.

    The other arguments are those of `NaturalGradientMaker`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        fisher_type: str = FISHER_MC,
        loss_type: str = LOSS_CROSS_ENTROPY,
        scale: float = 1,
        grad_scale: float = 1,
        n_mc_samples: int = 1,
        var: float = 1.0,
        seed: int | None = None,
        swift: bool = False,
        *,
        eigen: bool = False,
    ) -> None:
        if (swift or eigen) and (config.rank is not None or (swift and eigen)):
            raise ConfigError(
                "KfacGradientMaker: swift, eigen and config.rank are three forms of the factors: "
                "choose one"
            )
        shape = SHAPE_SWIFT_KRON if swift else SHAPE_KRON_EIGEN if eigen else SHAPE_KRON
        super().__init__(
            model,
            config,
            fisher_type=fisher_type,
            fisher_shape=shape,
            loss_type=loss_type,
            scale=scale,
            grad_scale=grad_scale,
            n_mc_samples=n_mc_samples,
            var=var,
            seed=seed,
        )
