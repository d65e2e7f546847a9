"""SoapGradientMaker: Adam in Shampoo's eigenbasis, as a direction in ``.grad``.

Source: Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam".  The implementation
is that of `distcurv.optim.LowRankSOAP`, which takes the step as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from distcurv.errors import ConfigError, StateError
from distcurv.makers.preconditioned import PreconditionedGradientMaker
from distcurv.makers.preconditioning_config import PreconditioningConfig
from distcurv.makers.service_settings import refuse_unused, service_settings
from distcurv.optim.arguments import check_options
from distcurv.optim.matrices import find_matrices
from distcurv.optim.soap_directions import SoapDirections
from distcurv.train.log import Record


class SoapGradientMaker(PreconditionedGradientMaker):
    """SOAP: the bases come from the service, the second moments are updated at every step.

    A matrix (a tensor of more dimensions is seen as [d_0, rest]) gets Adam's direction in the
    eigenbasis of its factors, a vector Adam's own.  The step is then that of an optimizer which
    subtracts lr times ``.grad``: torch.optim.SGD without momentum.  Weight decay is that
    optimizer's.  The first gradient of a matrix makes its basis and becomes zero.

    Args:
        model: bare or wrapped in DistributedDataParallel; or sharded by `fully_shard`.
        config: ``rank`` gives bases of low rank (the four-block rule), else they are full.
            ``ema_decay`` is the weight of a new statistic in the factors; not set: 1 - betas[1],
            as in the paper.  ``damping`` is not read: SOAP has ``eps``.
        betas: decay of momentum and second moments.
        eps: added to the roots of the second moments.

    Raises `ConfigError` for a setting that cannot work.
    """

    served = True

    def __init__(
        self,
        model: nn.Module,
        config: PreconditioningConfig,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(model, config)
        check_options(1.0, betas, eps, 0.0)
        refuse_unused(config, type(self).__name__, "the length of SOAP's step is its own")
        params = self.chosen_parameters()
        if not params:
            raise ConfigError("SoapGradientMaker: the model has no parameter to precondition")
        sides = [side for matrix in find_matrices(params.items()) for side in matrix.shape]
        self._soap = SoapDirections(
            list(params.items()),
            lr=1.0,
            betas=betas,
            eps=eps,
            rank=config.rank or max(sides, default=1),
            workers=config.workers,
            factor_decay=betas[1] if config.ema_decay is None else 1.0 - config.ema_decay,
            **service_settings(config, None),
        )

    def update_curvature(self) -> None:
        """Nothing: `precondition` takes statistics at these steps."""

    def update_preconditioner(self) -> None:
        """Nothing: the service's windows end at these steps."""

    def precondition(self) -> None:
        """Take statistics, install what is due and rewrite ``.grad``."""
        self._soap.step()

    def state_dict(self) -> dict[str, Any]:
        """The step, moments and the installed versions; local."""
        state = copy.deepcopy(self._soap.state_dict())
        return super().state_dict() | {"soap": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; call it on all ranks at the same step."""
        if "soap" not in state_dict:
            raise StateError("this state_dict has no 'soap': it is not of a SoapGradientMaker")
        self._soap.load_state_dict(copy.deepcopy(state_dict["soap"]))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "soap"})

    @property
    def install_log(self) -> list[Record]:
        """(step, block, version, folded_from, folded_through) of every install."""
        return self._soap.install_log

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, by the index that the install log uses."""
        return self._soap.block_names

    def summary(self) -> str:
        """What is computed where: each block and the worker that serves its basis."""
        return f"{super().summary()}\n{self._soap.summary()}"

    def metrics(self) -> dict[str, float | int]:
        """Counters of the service, see `distcurv.optim.LowRankSOAP.metrics`."""
        return self._soap.metrics()

    def close(self) -> None:
        """End threads and links; local and idempotent."""
        self._soap.close()
