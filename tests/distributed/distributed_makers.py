"""Scenarios of `distributed_ranks` about gradient makers that are served."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from distributed_tasks import ROWS, checksum, make_batch, make_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcurv.makers import PreconditioningConfig, ShampooGradientMaker, SoapGradientMaker

Result = dict[str, Any]

# By name: the maker, its options, its config.
SERVED_MAKERS: dict[str, tuple[Any, Result, Result]] = {
    "shampoo": (ShampooGradientMaker, {"grafting": "adagrad", "block_size": 8}, {}),
    # Rank 2: where an eigenvalue is at the tail its direction is what rounding chooses.
    "shampoo-low-rank": (ShampooGradientMaker, {}, {"rank": 2}),
    "soap": (SoapGradientMaker, {"eps": 1e-2}, {"rank": 2, "early_steps": 100}),
}
MAKER_STEPS = 6


def served_maker(save: Callable[[Any], None], maker: str, group: bool = False) -> Result:
    """What a maker makes of the gradients of six batches, the parameters standing still; by
    DistributedDataParallel, or by the maker's ``sync_group``."""
    make, options, config = SERVED_MAKERS[maker]
    net: nn.Module = make_model()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if group:
        options = {**options, "sync_group": dist.group.WORLD}
    elif ranks > 1:
        net = DistributedDataParallel(net)
    made = []
    settings = {"damping": 1e-2, "preconditioner_upd_interval": 2, "curvature_upd_interval": 1}
    with closing(make(net, PreconditioningConfig(**settings, **config), **options)) as gm:
        for step in range(MAKER_STEPS):
            rows = ROWS // ranks
            x, y = (t[rank * rows :][:rows] for t in make_batch(step))
            net.zero_grad(set_to_none=True)
            gm.setup_loss_call(F.mse_loss, gm.setup_model_call(net, x), y)
            gm.forward_and_backward()
            made += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        owners = gm.summary()
    save(made)
    return {"checksum": checksum(made), "summary": owners}


MAKER_FUNCTIONS = (served_maker,)
