"""Takes the statistics of layers while the user's own forward and backward run.

Only while armed: one global forward hook looks up the modules of the armed blocks.  Nothing is
attached to a module, so a copied, pickled or saved model never carries capture with it, and a
model whose statistics are not due runs as if distcurv were not there.

When a sample counts.  The input statistic is taken in the forward pass (the input may be gone or
overwritten later), the output statistic when the gradient of that very output arrives, and both
are delivered together, at the end of that backward.  So what does not count: a forward under
no_grad, a forward that no backward follows, the recomputation of a checkpoint (its outputs never
get a gradient), and a second backward through a retained graph.  A module that runs several times
counts each run.

Scales.  Statistics are those of the gradient of the per-sample loss (`LossScale`); its samples are
dimension 0 of the module's input.

Rows.  Of a call with many rows (tokens, positions) only ``max_rows`` are read, see `StepRows`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook

from distcurv.curvature.spec import BlockSpec, Tensors
from distcurv.errors import CaptureError, ConfigError
from distcurv.layers.layer import WEIGHT_SHARING, LayerIO, WeightSharing
from distcurv.train.calls import Arming, Call, Sink
from distcurv.train.captured_block import CapturedBlock
from distcurv.train.likelihood import Likelihood, as_likelihood
from distcurv.train.loss_scale import LossScale
from distcurv.train.nonfinite import FiniteGuard
from distcurv.train.rows import StepRows
from distcurv.train.sampling import Generators, sample_calls

FISHER_TYPES = ("empirical", "mc")


class Capture:
    """Capture of the statistics of some blocks.

    Args:
        blocks: by name: the module, its LayerIO, and its BlockSpec with two sides (A, G).
        loss_reduction: ``mean | sum``: how the training loss reduces over samples.
        accumulation: the number by which the user divides the loss of one micro-batch.
        grad_scaler: the AMP scaler whose scale the loss is multiplied with.
        fisher_type: ``empirical`` (gradients of the training loss) or ``mc`` (gradients for
            targets that `sample` draws from the model).
        weight_sharing: ``expand | reduce``, see `LayerIO`.
        max_rows: of a call read at most so many rows, drawn without bias; None: all.
        seed: for the drawn rows and the targets of ``mc``; let it differ between ranks.

    The sink gets (name, tensors): one contribution, of one forward and backward of a block, as
    float32 sums under prefixed names (``A.Y, A.trace, A.count, ..., G.packed, G.count``), without
    ``steps``.  It may be called from autograd's threads, never twice at once.

    Raises `ConfigError` for a bad setting, `ShapeError` for a spec that does not fit its module.
    """

    def __init__(
        self,
        blocks: Mapping[str, tuple[nn.Module, LayerIO, BlockSpec]],
        *,
        loss_reduction: str = "mean",
        accumulation: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
        fisher_type: str = "empirical",
        weight_sharing: WeightSharing = "expand",
        max_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_choice("fisher_type", fisher_type, FISHER_TYPES)
        _check_choice("weight_sharing", weight_sharing, WEIGHT_SHARING)
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"max_rows is {max_rows}: give at least 1, or None for all rows")
        self.scale = LossScale(loss_reduction, accumulation, grad_scaler)
        self.blocks = {
            name: CapturedBlock(name, *block, weight_sharing) for name, block in blocks.items()
        }
        if len({id(block.module) for block in self.blocks.values()}) != len(self.blocks):
            raise ConfigError(f"two of the blocks {sorted(blocks)} have the same module")
        self.fisher_type = fisher_type
        self._max_rows = max_rows
        self._seed = seed
        self._generators = Generators(seed)
        self._arming: Arming | None = None
        self._armings = 0
        self._remove_hook: weakref.finalize[..., Any] | None = None
        self._sampling = False
        self._lock = threading.Lock()
        self._guard = FiniteGuard()

    @property
    def is_armed(self) -> bool:
        """Whether forwards are watched now."""
        return self._arming is not None

    @property
    def nonfinite(self) -> int:
        """Contributions so far that were not finite and counted as zeros (waits for the device)."""
        return self._guard.dropped

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
        due = {id(self.blocks[name].module): self.blocks[name] for name in bases}
        self._armings += 1
        rows = StepRows(self._max_rows, self._seed, self._armings if step is None else step)
        held = {name: dict(tensors) for name, tensors in bases.items()}
        self._arming = Arming(self._armings, due, held, rows, sink)
        # Weak: the hook is global and must not keep a forgotten capture and its model alive.
        handle = register_module_forward_hook(
            partial(_forward_hook, weakref.ref(self)), with_kwargs=True
        )
        self._remove_hook = weakref.finalize(self, handle.remove)
        self._remove_hook.atexit = False

    def disarm(self) -> None:
        """Watch nothing any more; calls that wait for their backward are dropped."""
        if self._remove_hook is not None:
            self._remove_hook()
        self._remove_hook = self._arming = None

    def finish(self) -> frozenset[str]:
        """Disarm, and return the names of armed blocks that delivered nothing (an unused branch,
        only run under no_grad, ...).

        Raises `CaptureError` in mode ``mc`` when a backward came without `sample`."""
        arming = self._arming
        if arming is None:
            return frozenset()
        self._make_statistics()  # of a backward that an exception has ended
        self.disarm()
        if arming.unsampled:
            raise CaptureError(
                "fisher_type='mc': a backward() came without sample() for the blocks "
                f"{', '.join(sorted(arming.unsampled))}. Call sample(logits, likelihood) between "
                "forward and backward(), for every micro-batch; activation checkpoints need "
                "use_reentrant=False"
            )
        return frozenset(block.name for block in arming.blocks.values()) - arming.delivered

    @contextmanager
    def armed(self, bases: Mapping[str, Tensors], sink: Sink) -> Iterator[None]:
        """`arm` for the body and `finish` after it; after an exception only `disarm`."""
        self.arm(bases, sink)
        try:
            yield
            self.finish()
        finally:
            self.disarm()

    def sample(
        self,
        logits: Tensor,
        likelihood: str | Likelihood,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """For ``mc``: draw targets from the model's own distribution and take the output
        statistics of their loss.  Call it between forward and backward; where no statistic is due
        it does nothing.

        The expectation does not depend on ``n_samples``: statistics are averaged, not gradients.
        With ``loss_reduction="mean"`` the result is the Fisher of the mean loss, the mean over
        all loss terms (elements of the targets).  Several calls, one per output head, add up.  No
        ``.grad`` and no hook of DistributedDataParallel is touched.

        Args:
            logits: the model's output of this forward, with its graph.
            likelihood: a name in `LIKELIHOODS` or an object like those.
            n_samples: how many targets to draw for each sample.
            generator: on the device of ``logits``; by default an own one, made from ``seed``.

        Raises `CaptureError` for ``empirical`` or for logits without a graph, `ConfigError` for a
        bad likelihood or ``n_samples``."""
        if self.fisher_type != "mc":
            raise CaptureError(f"sample() is for fisher_type='mc'; this is {self.fisher_type!r}")
        if n_samples < 1:
            raise ConfigError(f"n_samples is {n_samples}: give at least 1")
        likelihood = as_likelihood(likelihood)
        arming = self._arming
        if arming is None or not arming.edges:
            return
        if not logits.requires_grad:
            raise CaptureError(
                "sample() got logits without a graph: pass the model's output of this forward, "
                "not detached and not made under no_grad"
            )
        if generator is None:
            generator = self._generators.on(logits.device)
        self._sampling = True
        try:
            mean = self.scale.reduction == "mean"
            sample_calls(arming.edges, logits, likelihood, n_samples, generator, mean=mean)
        finally:
            self._sampling = False

    def _observe(self, arming: Arming, block: CapturedBlock, input: Tensor, out: Tensor) -> None:
        """A module of a due block has run."""
        # During `sample` only a checkpoint's recomputation runs modules.
        counts = torch.is_grad_enabled() and out.requires_grad and input.numel() > 0
        if self._sampling or not counts:
            return
        bases = arming.bases[block.name]
        rows = arming.rows.of_call(arming.calls[block.name])
        arming.calls[block.name] += 1
        reading = block.read_input(input, bases, rows)
        call = Call(arming.number, block, len(input), bases, rows, reading)
        # A forward inside a backward is a recomputation: keeping its edge would keep its graph.
        if self.fisher_type == "mc" and torch._C._current_graph_task_id() == -1:
            arming.edges[call] = get_gradient_edge(out)
        # Weak: the graph holds the hook, and the arming holds the graph's edges.
        out.register_hook(partial(_gradient_hook, weakref.ref(self), call))

    def _deliver(self, call: Call, grad_output: Tensor) -> None:  # its output's gradient is here
        with self._lock:
            arming = self._arming
            if self._sampling or call.done or arming is None or arming.number != call.arming:
                return
            call.done = True
            arming.edges.pop(call, None)
            if self.fisher_type == "mc" and not call.reached:
                arming.unsampled.add(call.block.name)
                return
            call.complete(grad_output, self.scale if self.fisher_type == "empirical" else None)
            backward = torch._C._current_graph_task_id()
            if arming.queued_in != backward:
                # Once this backward has ended: then all layers' arithmetic is done in a row.
                queue = torch.autograd.Variable._execution_engine.queue_callback
                queue(partial(_end_of_backward, weakref.ref(self)))
                arming.queued_in = backward
            arming.arrived.append(call)

    def _make_statistics(self) -> None:
        """Deliver what has arrived."""
        with self._lock:
            arming = self._arming
            if arming is None:
                return
            arrived, arming.arrived = arming.arrived, []
            for call in arrived:
                arming.delivered.add(call.block.name)
                arming.sink(call.block.name, self._guard(call.statistic()))


def _forward_hook(
    capture_ref: weakref.ref[Capture],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    capture = capture_ref()
    if capture is None or capture._arming is None:
        return
    block = capture._arming.blocks.get(id(module))
    if block is not None:
        capture._observe(capture._arming, block, args[0] if args else kwargs["input"], output)


def _gradient_hook(capture_ref: weakref.ref[Capture], call: Call, grad: Tensor | None) -> None:
    capture = capture_ref()
    if capture is not None and grad is not None:
        capture._deliver(call, grad)


def _end_of_backward(capture_ref: weakref.ref[Capture]) -> None:
    capture = capture_ref()
    if capture is not None:
        capture._make_statistics()


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}: use one of {', '.join(choices)}")
