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
from distcurv.curvature.four_block_parts import Projections
from distcurv.curvature.four_block_shards import SummedProducts
from distcurv.curvature.precision import full_float32
from distcurv.errors import ConfigError, StateError
from distcurv.optim import arguments
from distcurv.optim.matrices import ShardedMatrix, find_matrices, matrix_spec
from distcurv.optim.matrix_rule import FIELDS, MatrixRule, descend
from distcurv.optim.sharded_rule import ShardedRule, check_saved
from distcurv.optim.vectors import update_vectors
from distcurv.train import checkpoint, coverage, metrics
from distcurv.train.activations import ActivationSource
from distcurv.train.discover import bare_model, named_parameters, parameter_places
from distcurv.train.eager import uncompiled
from distcurv.train.log import Record
from distcurv.train.pipeline import Pipeline
from distcurv.train.provider import Workers
from distcurv.train.same_parameters import SameParameters
from distcurv.train.summary import Summary
from distcurv.train.switch import Install


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
            worker on each node where `distcurv.train.placement` finds that it pays and a core is
            free, else in process) or a list of endpoints.
        grad_scaler: the AMP scaler that the loss is scaled with; for ``source="activations"``
            alone, as ``scaler.step(optimizer)`` unscales the gradients.
        replay: install log of an earlier run to follow exactly.
        settings: further fields of `distcurv.SoapConfig`.

    Gradients must be the same on all training ranks when `step` is called (DDP does that), or the
    parameters sharded by `fully_shard` before this is made (docs/guides/fsdp.md); clipped gradients
    make clipped statistics.  The first gradient of a matrix makes its basis and moments and gives
    no direction, as in SOAP.
    Sources: Vyas et al. 2024 (SOAP); the four-block rule is described in docs/architecture.md.
    """

    # What is done with the directions of matrices and of vectors.
    _follow, _follow_vectors = staticmethod(descend), staticmethod(update_vectors)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 64,
        source: str = "gradient",
        workers: Workers = "auto",
        replay: Sequence[Sequence[int]] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
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
        given: Any = params if model is None else list(named_parameters(bare_model(model)))
        super().__init__(
            given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            arguments.check_options(*(group[k] for k in ("lr", "betas", "eps", "weight_decay")))
        self._named = named = arguments.named_params(self.param_groups)
        places = parameter_places(model)
        self._same = SameParameters("LowRankSOAP", places, may_be_gathered=True)
        self._matrices = find_matrices(named)
        self._make_rules()
        self._pipeline = Pipeline(
            [matrix_spec(matrix, self.config) for matrix in self._matrices],
            self.config,
            device=arguments.common_device([p for _, p in named]),
            replicated=source == "gradient" and self._shards is None,
            workers=workers,
            inline_fallback=True,
            replay=replay,
        )
        self._workers = coverage.told_workers(
            self._pipeline.group, self._pipeline.table, self._pipeline.lanes
        )
        # Gradients whose statistic was not finite; a tensor, so that no step waits for the device.
        self._nonfinite = torch.zeros((), device=self._pipeline.device)
        self._block_of = {id(m.param): block for block, m in enumerate(self._matrices)}
        self._whole = {id(m.param): b for b, m in enumerate(self._matrices) if m.rows is None}
        self._source: ActivationSource | None = None
        if model is not None and source == "activations":
            self._source = ActivationSource.of_weights(
                model, self._block_of, self._pipeline, self.config, grad_scaler
            )
            self._source.arm_if_due()

    def _make_rules(self) -> None:
        self._rule = MatrixRule(self._matrices, self.state, self._follow)
        sharded = {b: m for b, m in enumerate(self._matrices) if isinstance(m, ShardedMatrix)}
        self._shards = ShardedRule(sharded, self._rule, self.state) if sharded else None

    # -- the step -------------------------------------------------------------------------

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` reevaluates the model once and returns the loss.  Raises
        `StateError` where the model has other parameters than at the start."""
        self._same.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pipeline = self._open_pipeline()
        arguments.refuse_sparse(self._named)
        grads = [g for m in self._matrices if m.rows is None and (g := m.param.grad) is not None]
        due = pipeline.capture_due
        projections = self._add_statistics(pipeline) if due else {}
        products = self._add_shards_statistics(pipeline) if due else {}
        if self._source is not None:
            self._source.finish()
        before = list(pipeline.installed)
        installs = pipeline.step(grads)
        self._turn(pipeline, before, installs)
        for install in installs:
            projections.pop(install.block, None)
            products.pop(install.block, None)
        if self._shards is not None:
            with full_float32(pipeline.device):
                products = self._shards.products(pipeline.installed, products)
        for group in self.param_groups:
            with full_float32(pipeline.device):
                self._rule.update(group, self._whole, pipeline.installed, projections)
                if self._shards is not None:
                    self._shards.update(group, self._block_of, pipeline.installed, products)
            self._follow_vectors(group, self.state, self._block_of)
        if self._source is not None:
            self._source.arm_if_due()
        return loss

    def _add_statistics(self, pipeline: Pipeline) -> dict[int, Projections]:
        """Returns the gradients' projections on the bases in use that were made, by block."""
        projections: dict[int, Projections] = {}
        watched = self._source.blocks if self._source is not None else frozenset[int]()
        with full_float32(pipeline.device):
            for block, matrix in enumerate(self._matrices):
                mine = pipeline.table.owners[block] == pipeline.group.rank and matrix.rows is None
                if block in watched or matrix.param.grad is None or not mine:
                    continue
                basis, installed = pipeline.basis(block), pipeline.installed[block]
                if basis is installed:
                    # The update wants them in any case.
                    projections[block] = self._rule.project(block, installed)
                statistic = self._rule.statistic(
                    pipeline.table.specs[block], block, basis, projections.get(block)
                )
                self._nonfinite += 1 - statistic["steps"]
                pipeline.add(block, statistic)
        return projections

    def _add_shards_statistics(self, pipeline: Pipeline) -> dict[int, SummedProducts]:
        """Returns the products of the sharded gradients with the bases in use that were made."""
        if self._shards is None:
            return {}
        watched = self._source.blocks if self._source is not None else frozenset[int]()
        with full_float32(pipeline.device):
            products, missed = self._shards.statistics(pipeline, watched)
        for share in missed:
            self._nonfinite += share
        return products

    def _turn(
        self, pipeline: Pipeline, before: Sequence[Install], installs: Sequence[Install]
    ) -> None:
        if not installs:
            return
        early = pipeline.timetable.is_early(installs[0].step)
        with full_float32(pipeline.device):
            sharded = []
            for install in installs:
                if self._matrices[install.block].rows is not None:
                    sharded.append((before[install.block], install))
                else:
                    self._rule.turn(before[install.block], install, early=early)
            if self._shards is not None:
                self._shards.turn(sharded, early=early)

    # -- state ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer`, with the installed versions under ``curvature``; local.

        Of a sharded parameter it has this rank's rows: each rank saves and loads its own."""
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
        ids = [i for group in plain["param_groups"] for i in group["params"]]
        for index, (name, param) in zip(ids, self._named, strict=True):
            check_saved(name, param, plain["state"].get(index, {}), id(param) in self._block_of)
        checkpoint.load(self._open_pipeline(), state_dict["curvature"])
        super().load_state_dict(plain)
        # The base class casts state to the parameter's dtype; the moments must stay float32.
        for index, (_, param) in zip(ids, self._named, strict=True):
            # Empty where there was no gradient yet.
            if id(param) in self._block_of and plain["state"].get(index):
                for name in FIELDS:
                    saved = plain["state"][index][name]
                    self.state[param][name] = saved.to(param.device).clone()
        self._make_rules()  # the base class has a new state dict
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
        ``statistics_nonfinite``, gradients (or watched calls) that were not finite, or of a step
        that AMP's scaler left out, and count as zeros."""
        nonfinite = int(self._nonfinite)
        if self._source is not None:
            nonfinite += self._source.nonfinite
        return metrics.collect(self._open_pipeline()) | {"statistics_nonfinite": nonfinite}

    def summary(self) -> Summary:
        """Every parameter, its block and how that is served, or why it has none; local.  ``str()``
        of it is a table, its ``rows`` are the data."""
        rows = coverage.block_rows(self._open_pipeline().table, self._workers)
        return coverage.matrices_summary(self._named, self._block_of, rows)

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
