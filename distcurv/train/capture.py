"""Takes the statistics of layers while the user's own forward and backward run.

Only while armed: one global forward hook looks up the modules of the armed blocks, and blocks that
no module stands for are found where functions use their parameters (`FunctionWatch`).  Nothing is
attached to a module, so a copied, pickled or saved model never carries capture with it, and a
model whose statistics are not due runs as if distcurv were not there.

When a sample counts.  The input statistic is taken in the forward pass (the input may be gone or
overwritten later), the output statistic when the gradient of that very output arrives, and both
are delivered together, at the end of that backward.  So what does not count: a forward under
no_grad, a forward that no backward follows, the recomputation of a checkpoint (its outputs never
get a gradient), a second backward through a retained graph, and a backward with create_graph=True
(of a gradient penalty, whose loss has its own backward).  A module that runs several times
shows more positions of the same samples: each run adds to the sums, the samples count once.

Scales.  Statistics are those of the gradient of a single term of the loss (`LossScale`).  Without
being told how many terms the loss has counted, its terms are taken to be dimension 0 of the
module's input.

Rows.  Of a call with many rows (tokens, positions) only ``max_rows`` are read, see `StepRows`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.errors import CaptureError, ConfigError
from distcurv.layers.joint import JointIO
from distcurv.layers.layer import WEIGHT_SHARING, LayerIO, WeightSharing
from distcurv.train.calls import Arming, Call, Sink
from distcurv.train.captured_block import CapturedBlock, Watched
from distcurv.train.fisher import FISHER_TYPES, Fisher
from distcurv.train.hooks import end_of_backward, gradient_hook, watch
from distcurv.train.joined import joined
from distcurv.train.likelihoods import Likelihood
from distcurv.train.loss_scale import LossScale
from distcurv.train.nonfinite import FiniteGuard
from distcurv.train.rows import StepRows
from distcurv.train.terms import Terms
from distcurv.train.uses import Use

T = TypeVar("T")


class Capture:
    """Capture of the statistics of some blocks.

    Args:
        blocks: by name: module, layer and BlockSpec, and what else `Watched` says.
        loss_reduction: ``mean | sum``: how the training loss reduces over its terms.
        accumulation: the number by which the user divides the loss of one micro-batch.
        grad_scaler: the AMP scaler whose scale the loss is multiplied with.
        fisher_type: ``empirical | mc | exact``, see `Fisher`.
        weight_sharing: ``expand | reduce``, see `LayerIO`; or that of each block by name.
        max_rows: of a call read at most so many rows, drawn without bias; None: all.  Or by name.
        seed: for the drawn rows and the targets of ``mc``; let it differ between ranks.

    The sink gets (name, tensors): one contribution, of one forward and backward of a block, as
    float32 sums under prefixed names (``A.Y, A.trace, A.count, ..., G.packed, G.count``), without
    ``steps``.  It may be called from autograd's threads, never twice at once.

    Raises `ConfigError` for a bad setting, `ShapeError` for a spec that does not fit its module.
    """

    def __init__(
        self,
        blocks: Mapping[str, Watched | tuple[nn.Module, LayerIO | JointIO, BlockSpec]],
        *,
        loss_reduction: str = "mean",
        accumulation: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
        fisher_type: str = "empirical",
        weight_sharing: WeightSharing | Mapping[str, WeightSharing] = "expand",
        max_rows: int | Mapping[str, int | None] | None = None,
        seed: int = 0,
    ) -> None:
        _check_choice("fisher_type", fisher_type, FISHER_TYPES)
        sharing: dict[str, WeightSharing] = _by_name(weight_sharing, blocks)
        self._max_rows = _by_name(max_rows, blocks)
        for own in sharing.values():
            _check_choice("weight_sharing", own, WEIGHT_SHARING)
        for most in self._max_rows.values():
            if most is not None and most < 1:
                raise ConfigError(f"max_rows is {most}: give at least 1, or None for all rows")
        self.scale = LossScale(loss_reduction, accumulation, grad_scaler)
        self.blocks = {
            name: CapturedBlock(name, Watched(*block), sharing[name])
            for name, block in blocks.items()
        }
        self.fisher_type = fisher_type
        self._fisher = Fisher(fisher_type, loss_reduction == "mean", seed)
        self._seed = seed
        self._arming: Arming | None = None
        self._armings = 0
        self._remove_hook: weakref.finalize[..., Any] | None = None
        self._lock = threading.Lock()
        self._guard = FiniteGuard()
        self.terms: Terms | None = None

    @property
    def is_armed(self) -> bool:
        """Whether forwards are watched now."""
        return self._arming is not None

    @property
    def arming(self) -> Arming | None:
        """What is watched now, for the hooks."""
        return self._arming

    @property
    def nonfinite(self) -> int:
        """Contributions so far that were not finite and counted as zeros (waits for the device)."""
        return self._guard.dropped

    def set_loss_reduction(self, reduction: str) -> None:
        """How the losses of the coming backwards reduce; see the constructor."""
        self.scale = replace(self.scale, reduction=reduction)

    def arm(self, bases: Mapping[str, Tensors], sink: Sink, step: int | None = None) -> None:
        """Watch the forwards from now on.

        Args:
            bases: which blocks are due, each with the published tensors of the version to sketch
                against (``A.U`` and ``G.U``; dense sides need none).
            sink: what receives the statistics.
            step: the training step, of which the drawn rows depend; by default armings count.

        Raises `CaptureError` when armed already, for an unknown block, or for a missing basis;
        then nothing is watched.
        """
        if self._arming is not None:
            raise CaptureError("Capture.arm: already armed; call finish() or disarm() first")
        for name in bases:
            if name not in self.blocks:
                raise CaptureError(f"Capture.arm: no block {name!r} among {sorted(self.blocks)}")
            self.blocks[name].check_bases(bases[name])
        due = [self.blocks[name] for name in bases]
        self._armings += 1
        draw = self._seed, self._armings if step is None else step
        rows = {name: StepRows(most, *draw) for name, most in self._max_rows.items()}
        held = {name: dict(tensors) for name, tensors in bases.items()}
        self._arming = Arming(self._armings, due, held, rows, sink)
        self._remove_hook = watch(self, [block for block in due if block.calls])

    def disarm(self) -> None:
        """Watch nothing any more; calls that wait for their backward are dropped."""
        if self._remove_hook is not None:
            self._remove_hook()
        self._remove_hook = self._arming = None

    def finish(self) -> frozenset[str]:
        """Disarm, and return the names of armed blocks that delivered nothing (an unused branch,
        only run under no_grad, ...).

        Raises `CaptureError` for ``mc`` and ``exact`` when a backward came without `sample`."""
        arming = self._arming
        if arming is None:
            return frozenset()
        self.make_statistics()  # of a backward that an exception has ended
        self.disarm()
        self.terms = arming.micro_batches.total()
        arming.warn_of_lost()
        arming.check_sampled(self.fisher_type)
        return arming.names - arming.delivered

    @contextmanager
    def armed(self, bases: Mapping[str, Tensors], sink: Sink) -> Iterator[None]:
        """`arm` for the body and `finish` after it; after an exception only `disarm`."""
        self.arm(bases, sink)
        try:
            yield
            self.finish()
        finally:
            self.disarm()

    def paused(self) -> AbstractContextManager[None]:
        """While it lasts overlook gradients: those that another capture's `sample` makes."""
        return self._fisher.paused()

    def count_terms(self, terms: Terms, divisor: Terms | None = None) -> None:
        """See `Fisher.count_terms`."""
        self._fisher.count_terms(self._arming, terms, divisor)

    def sample(
        self,
        logits: Tensor,
        likelihood: str | Likelihood,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """See `Fisher.sample`."""
        self._fisher.sample(self._arming, logits, likelihood, n_samples, generator, targets)

    def observe_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        likelihood: str | Likelihood,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """See `Fisher.observe_loss`."""
        self._fisher.observe_loss(self._arming, logits, targets, likelihood, n_samples, generator)

    def observe(
        self, arming: Arming, block: CapturedBlock, use: Use, input: Tensor, out: Tensor
    ) -> None:
        """A module or a function has used a due block."""
        # During `sample` only a checkpoint's recomputation runs modules.
        if self._fisher.running:
            return
        if input.is_nested:
            raise CaptureError(f"block {block.name!r} got a nested tensor: give it a padded one")
        counts = torch.is_grad_enabled() and out.requires_grad and input.numel() > 0
        micro_batch = arming.micro_batches.of_forward(with_graph=counts)
        if not counts:
            return
        bases = arming.bases[block.name]
        rows = arming.rows[block.name].of_call(arming.calls[block.name])
        arming.calls[block.name] += 1
        # A forward inside a backward is a recomputation: keeping its edge would keep its graph.
        recomputed = torch._C._current_graph_task_id() != -1
        call = Call(arming.number, block, use, input, bases, rows, micro_batch, recomputed)
        if recomputed:
            self._await_end(arming)
        elif not self._fisher.is_empirical:
            arming.edges[call] = get_gradient_edge(out)
        # Weak: the graph holds the hook, and the arming holds the graph's edges.
        out.register_hook(partial(gradient_hook, weakref.ref(self), call))

    def deliver(self, call: Call, grad_output: Tensor) -> None:
        """The gradient of a call's output has arrived."""
        with self._lock:
            arming = self._arming
            if self._fisher.running or call.done or arming is None or arming.number != call.arming:
                return
            if torch.is_grad_enabled():
                # create_graph=True: these gradients are part of a loss to come.
                arming.differentiated.add(call.block.name)
                return
            call.done = True
            arming.edges.pop(call, None)
            arming.micro_batches.end(call.micro_batch)
            empirical = self._fisher.is_empirical
            if not empirical and not call.reached:
                arming.unsampled.add(call.block.name)
                return
            call.complete(grad_output, self.scale, empirical=empirical)
            # What a checkpoint recomputes gets its gradients in a backward nested in the one to
            # wait for: a block may be used in both, and by several checkpoints.
            if not call.recomputed:
                self._await_end(arming)
            arming.arrived.append(call)

    def _await_end(self, arming: Arming) -> None:
        """Once the backward that runs has ended, all layers' arithmetic is done in a row."""
        backward = torch._C._current_graph_task_id()
        if arming.queued_in != backward:
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(partial(end_of_backward, weakref.ref(self)))
            arming.queued_in = backward

    def make_statistics(self) -> None:
        """Deliver what has arrived."""
        with self._lock:
            arming = self._arming
            if arming is None:
                return
            arrived, arming.arrived = arming.arrived, []
            calls: dict[tuple[str, int], list[Call]] = {}
            for call in arrived:
                key = call.block.name, id(call.micro_batch)
                calls.setdefault(key, []).append(call)
            for (name, _), own in calls.items():
                arming.delivered.add(name)
                arming.sink(name, self._guard(joined(own)))
                for call in own:
                    call.forget()


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}: use one of {', '.join(choices)}")


def _by_name(value: T | Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    return {name: value[name] if isinstance(value, Mapping) else value for name in names}
