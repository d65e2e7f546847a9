"""LowRankSOAP: Adam's second moments in a low-rank eigenbasis that the service keeps fresh.

The flagship.  Every matrix is preconditioned by the four-block rule over the installed bases;
vectors (biases, norms) get AdamW's rule.  The bases come from the curvature service and may be
many steps old; the moments are updated here at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distcurv.config import SoapConfig
from distcurv.curvature.four_block import FourBlockState, advance, init_state
from distcurv.curvature.four_block_parts import Projections, project
from distcurv.curvature.four_block_turn import turn
from distcurv.curvature.precision import full_float32
from distcurv.curvature.statistics import encode_gradient
from distcurv.errors import ConfigError, StateError
from distcurv.optim import arguments
from distcurv.optim.matrices import find_matrices, matrix_spec
from distcurv.optim.vectors import update_vectors
from distcurv.train import checkpoint, metrics
from distcurv.train.activations import ActivationSource
from distcurv.train.discover import bare_model
from distcurv.train.log import Record
from distcurv.train.pipeline import Pipeline
from distcurv.train.provider import Workers
from distcurv.train.switch import Install

_FIELDS = FourBlockState._fields


class LowRankSOAP(torch.optim.Optimizer):
    """Low-rank SOAP with bases refreshed by the curvature service.

    Args:
        params: a model, or what `torch.optim.Optimizer` takes.  A model gives the blocks their
            names and is needed for ``source="activations"``.
        lr: learning rate; one to four times AdamW's best in the two demo tasks.
        betas: decay of momentum and second moments.
        eps: added to the roots of the moments.
        weight_decay: decoupled weight decay.
        rank: r of every basis; sides with d <= r take the full basis.
        source: ``gradient`` (Shampoo's factors, no hooks) or ``activations`` (K-FAC's).
        workers: ``0``/``"inline"``, ``"auto"`` (the endpoints of ``DISTCURV_ENDPOINTS``, else one
            worker process on each node) or a list of endpoints.
        replay: install log of an earlier run to follow exactly.
        settings: further fields of `distcurv.SoapConfig`.

    Gradients must be the same on all training ranks when `step` is called (DDP does that); clipped
    gradients make clipped statistics.  The
    first gradient of a matrix makes its basis and moments and gives no direction, as in SOAP.
    Sources: Vyas et al. 2024 (SOAP); the four-block rule is described in docs/architecture.md.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 16,
        source: str = "gradient",
        workers: Workers = "auto",
        replay: Sequence[Sequence[int]] | None = None,
        **settings: Any,
    ) -> None:
        self.config = SoapConfig(rank=rank, source=source, **settings)
        model = params if isinstance(params, nn.Module) else None
        if model is None and source == "activations":
            raise ConfigError(
                "LowRankSOAP(source='activations') needs the model to watch: pass the model "
                "instead of its parameters, or use source='gradient'"
            )
        self._pipeline: Pipeline | None = None
        # Names of the bare model: a state_dict fits with and without DistributedDataParallel.
        given: Any = params if model is None else list(bare_model(model).named_parameters())
        super().__init__(
            given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            arguments.check_options(*(group[k] for k in ("lr", "betas", "eps", "weight_decay")))
        self._named = named = arguments.named_params(self.param_groups)
        self._matrices = find_matrices(named)
        self._pipeline = Pipeline(
            [matrix_spec(matrix, self.config) for matrix in self._matrices],
            self.config,
            device=arguments.common_device([p for _, p in named]),
            replicated=source == "gradient",
            workers=workers,
            inline_fallback=True,
            replay=replay,
        )
        # Gradients whose statistic was not finite; a tensor, so that no step waits for the device.
        self._nonfinite = torch.zeros((), device=self._pipeline.device)
        self._block_of = {id(m.param): block for block, m in enumerate(self._matrices)}
        self._source: ActivationSource | None = None
        if model is not None and source == "activations":
            self._source = ActivationSource.of_weights(
                model, self._block_of, self._pipeline, self.config
            )
            self._source.arm_if_due()

    # -- the step -------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` reevaluates the model once and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pipeline = self._open_pipeline()
        arguments.refuse_sparse(self._named)
        grads = [m.param.grad for m in self._matrices if m.param.grad is not None]
        projections = self._add_statistics(pipeline) if pipeline.capture_due else {}
        if self._source is not None:
            self._source.finish()
        before = [pipeline.installed[block] for block in range(len(self._matrices))]
        for install in pipeline.step(grads):
            self._turn(before[install.block], install)
            projections.pop(install.block, None)
        for group in self.param_groups:
            with full_float32(pipeline.device):
                self._update_matrices(group, pipeline, projections)
            update_vectors(group, self.state, self._block_of)
        if self._source is not None:
            self._source.arm_if_due()
        return loss

    def _add_statistics(self, pipeline: Pipeline) -> dict[int, Projections]:
        """Returns the projections on the installed bases that were made on the way, by block."""
        projections: dict[int, Projections] = {}
        watched = self._source.blocks if self._source is not None else frozenset[int]()
        for block, matrix in enumerate(self._matrices):
            grad = matrix.param.grad
            mine = pipeline.table.owners[block] == pipeline.group.rank
            if block in watched or grad is None or not mine:
                continue
            spec, basis = pipeline.table.specs[block], pipeline.basis(block)
            wide = matrix.view(grad).float()
            with full_float32(pipeline.device):
                own = project(wide, basis.tensors["G.U"], basis.tensors["A.U"])
            statistic = encode_gradient(
                spec, wide, basis.tensors, grad_Ua=own.in_Oa, Ug_grad=own.out_gI
            )
            self._nonfinite += 1 - statistic["steps"]
            pipeline.add(block, statistic)
            if basis is pipeline.installed[block]:
                projections[block] = own
        return projections

    def _turn(self, old: Install, new: Install) -> None:
        matrix = self._matrices[new.block]
        state = self.state[matrix.param]
        if not state:
            return
        turned = turn(
            FourBlockState(*(state[name] for name in _FIELDS)),
            old.tensors["G.U"],
            old.tensors["A.U"],
            new.tensors["G.U"],
            new.tensors["A.U"],
        )
        state.update(zip(_FIELDS, turned, strict=True))

    def _update_matrices(
        self, group: dict[str, Any], pipeline: Pipeline, projections: dict[int, Projections]
    ) -> None:
        lr = float(group["lr"])
        params, states, grads, bases, made = [], [], [], [], []
        for param in group["params"]:
            block = self._block_of.get(id(param))
            if block is None or param.grad is None:
                continue
            tensors = pipeline.installed[block].tensors
            bases.append((tensors["G.U"], tensors["A.U"]))
            params.append(param)
            states.append(self._state_of(block, *bases[-1]))
            grads.append(self._matrices[block].view(param.grad))
            made.append(projections.get(block))
        directions = advance(
            [FourBlockState(*(state[name] for name in _FIELDS)) for state in states],
            grads,
            [out for out, _ in bases],
            [into for _, into in bases],
            steps=[state["step"] for state in states],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            projections=made,
        )
        if params and group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for param, state, grad, direction in zip(params, states, grads, directions, strict=True):
            if state["step"] == 1:
                # The first basis diagonalises this very gradient: beside the diagonal there is
                # only rounding, which the division by its own size would make a full update.
                continue
            if param.is_contiguous() and param.dtype == torch.float32:
                direction.subtract_from(param.view(grad.shape), lr)
            else:
                param.sub_(direction.dense().view(param.shape).mul_(lr))

    def _state_of(self, block: int, basis_out: Tensor, basis_in: Tensor) -> dict[str, Any]:
        """A matrix's state with its step counted on."""
        matrix = self._matrices[block]
        state: dict[str, Any] = self.state[matrix.param]
        if not state:
            first = init_state(
                matrix.shape, basis_out.shape[-1], basis_in.shape[-1], device=matrix.param.device
            )
            state["step"] = 0
            state.update(zip(_FIELDS, first, strict=True))
        state["step"] += 1
        return state

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer`, with the installed versions under ``curvature``; local."""
        state = super().state_dict()
        state["curvature"] = checkpoint.save(self._open_pipeline())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; call it on all ranks at the same step."""
        if "curvature" not in state_dict:
            raise StateError("this state_dict has no 'curvature' entry: it is not of a LowRankSOAP")
        plain = {key: value for key, value in state_dict.items() if key != "curvature"}
        checkpoint.read(self._open_pipeline(), state_dict["curvature"])
        arguments.check_groups(self.param_groups, plain["param_groups"])
        checkpoint.load(self._open_pipeline(), state_dict["curvature"])
        super().load_state_dict(plain)
        # The base class casts state to the parameter's dtype; the moments must stay float32.
        ids = [i for group in plain["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(ids, params, strict=True):
            if id(param) in self._block_of and index in plain["state"]:
                for name in _FIELDS:
                    saved = plain["state"][index][name]
                    self.state[param][name] = saved.to(param.device).clone()
        if self._source is not None:
            self._source.arm_if_due()  # against the restored bases

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the constructor alone: raises `StateError` afterwards, see there why."""
        if getattr(self, "_pipeline", None) is not None:
            raise StateError(
                "LowRankSOAP cannot take a param group later: the block table is fixed when the "
                "optimizer is made; pass all groups to the constructor"
            )
        super().add_param_group(param_group)

    @property
    def install_log(self) -> list[Record]:
        """(step, block, version, folded_from, folded_through) of every install."""
        return self._open_pipeline().install_log.records()

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, by the index that the install log uses."""
        return [matrix.name for matrix in self._matrices]

    def metrics(self) -> dict[str, float | int]:
        """Counters of this rank, see `distcurv.train.metrics.collect`; and
        ``statistics_nonfinite``, gradients (or watched calls) that were not finite and count as
        zeros."""
        nonfinite = int(self._nonfinite)
        if self._source is not None:
            nonfinite += self._source.capture.nonfinite
        return metrics.collect(self._open_pipeline()) | {"statistics_nonfinite": nonfinite}

    def close(self) -> None:
        """End threads, links and hooks; local and idempotent."""
        if self._source is not None:
            self._source.disarm()
        if self._pipeline is not None:
            self._pipeline.close()

    def __enter__(self) -> LowRankSOAP:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open_pipeline(self) -> Pipeline:
        if self._pipeline is None:
            raise StateError("LowRankSOAP is not constructed")
        return self._pipeline
