"""What capture remembers while it is armed: forward calls that wait for their backward."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from distcurv.curvature.row_draw import Sampler
from distcurv.curvature.spec import Tensors
from distcurv.errors import CaptureError
from distcurv.train.captured_block import CapturedBlock
from distcurv.train.loss_scale import LossScale
from distcurv.train.rows import StepRows
from distcurv.train.sample_uses import SampleUse, Shown
from distcurv.train.terms import MicroBatch, MicroBatches
from distcurv.train.uses import Reading, Use

log = logging.getLogger("distcurv.train")

Sink = Callable[[str, Tensors], None]


class Call:
    """One forward call of a block.

    Attributes:
        arming: the number of the arming it belongs to.
        samples: N, dimension 0 of the module's input.
        bases: the bases that were installed at the forward.
        sampler: chooses the rows that both sides look at.
        use: how the block was used.
        input: what makes the statistic of what the forward showed (``A.*``).
        kept: what the use wants to see again at the backward.
        micro_batch: the one it belongs to.
        recomputed: whether the forward ran amid a backward, which another is then nested in.
        output: what makes that of the output's gradient (``G.*``), None until it has arrived.
        heads: the same of each `Capture.sample` (``mc`` and ``exact``) whose logits depend on the
            call, and the number of terms it counted.
        shown: what the training loss has shown of its per-sample gradients, for a use that joins
            them with other calls'.
        reached: whether `Capture.sample` has looked at this call.
        done: whether its backward has been counted.
    """

    def __init__(
        self,
        arming: int,
        block: CapturedBlock,
        use: Use,
        input: Tensor,
        bases: Tensors,
        sampler: Sampler | None,
        micro_batch: MicroBatch,
        recomputed: bool = False,
    ) -> None:
        self.arming = arming
        self.block = block
        self.use = use
        self.samples = use.samples(input)
        self.bases = bases
        self.sampler = sampler
        self.input: Reading | None
        self.input, self.kept = use.read_input(input, bases, sampler)
        self.micro_batch = micro_batch
        self.recomputed = recomputed
        micro_batch.samples = max(micro_batch.samples, self.samples)
        self.output: Reading | None = None
        self.heads: list[tuple[Tensors, Tensor]] = []
        self.shown: Shown | None = None
        self.reached = False
        self.done = False

    @property
    def batch(self) -> int:
        """The samples that the call is for.  What runs on one sample amid a batch (the embedding
        of positions) is shared by all: its output's gradient is their sum, whose outer product
        stands for the sum of theirs."""
        return self.samples if self.samples > 1 else max(1, self.micro_batch.samples)

    def complete(self, grad_output: Tensor, scale: LossScale, *, empirical: bool) -> None:
        """The gradient of the output has arrived: that of the training loss with this scale; or,
        unless ``empirical``, what `Capture.sample` has made is all there is."""
        if empirical:
            told = self.micro_batch.told(grad_output.device)
            factor = scale.undo(self.batch if told is None else told[1], grad_output.device)
            self.output = self.read_output(grad_output, factor * factor)
            self.shown = self.show(grad_output, factor)
        elif self.heads:
            self.output = partial(self._of_heads, mean=scale.reduction == "mean")
        else:
            # No logits depend on this call: its Fisher is zero, its terms count.
            self.output = self.read_output(torch.zeros_like(grad_output), 1.0)

    def read_output(self, grad_output: Tensor, squared_scale: float | Tensor) -> Reading:
        """What makes the statistic of a gradient of the output."""
        return self.use.read_output(grad_output, self.kept, self.bases, squared_scale, self.sampler)

    def show(self, grad_output: Tensor, factor: float | Tensor) -> Shown | None:
        """What per-sample gradients are made of later; None where the use needs none."""
        if not self.use.per_sample:
            return None
        return cast(SampleUse, self.use).show(self.kept, grad_output, factor)

    def statistic(self) -> Tensors:
        """The whole statistic of a complete call, in float32; zeros where the loss had no term."""
        assert self.input is not None, "Call.statistic: call it before forget()"
        assert self.output is not None, "Call.statistic: call complete() first"
        made, output = self.input(), self.output()
        some = next(iter(output.values()))
        told = self.micro_batch.told(some.device)
        if told is None:
            counts = {} if self.batch == self.samples else _counts(output, float(self.batch))
            return {key: value.float() for key, value in (made | output | counts).items()}
        terms = told[0]
        counts = {key: terms for key in output if key.endswith(".count")}
        return {
            # The mean over no terms is NaN.
            key: torch.where(terms > 0, value.float(), 0.0)
            for key, value in (made | output | counts).items()
        }

    def forget(self) -> None:
        """Let go of what the statistic was made of: the call lives as long as the graph that it is
        hooked to, which may be until the next forward."""
        self.input = self.kept = self.output = self.shown = None
        self.heads.clear()

    def add_head(self, added: Tensors | None, terms: Tensor) -> None:
        """What one `Capture.sample` has made, over so many terms; None where its logits do not
        depend on the call."""
        self.reached = True
        if added is not None:
            self.heads.append((added, terms))

    def _of_heads(self, *, mean: bool) -> Tensors:
        """The sums over heads: those of means are brought to one number of terms."""
        (total, terms), *others = self.heads
        told = self.micro_batch.told(terms.device)
        assert told is not None
        if mean:
            total = _over(total, terms, told[0])
        for added, terms in others:
            if mean:
                added = _over(added, terms, told[0])
            total = plus(total, added)
        return total


def plus(one: Tensors, other: Tensors) -> Tensors:
    """The sums of what both have, and what one of them has."""
    return one | {k: one[k] + value if k in one else value for k, value in other.items()}


def _counts(output: Tensors, count: float) -> Tensors:
    return {
        key: value.new_full((), count) for key, value in output.items() if key.endswith(".count")
    }


def _over(sums: Tensors, terms: Tensor, all_terms: Tensor) -> Tensors:
    """Sums over some terms as they would be over more with the same mean."""
    factor = torch.where(terms > 0, all_terms / terms, 0.0)
    return {key: value * factor for key, value in sums.items()}


class Place(NamedTuple):
    """A module whose forward uses a block, and how."""

    block: CapturedBlock
    use: Use


class Arming:
    """What lives from `Capture.arm` to `Capture.disarm`."""

    def __init__(
        self,
        number: int,
        blocks: list[CapturedBlock],
        bases: dict[str, Tensors],
        rows: dict[str, StepRows],
        sink: Sink,
    ) -> None:
        self.number = number
        self.names = frozenset(block.name for block in blocks)
        self.places: dict[int, list[Place]] = {}  # by the id of the module
        for block in blocks:
            for module, use in block.module_uses():
                self.places.setdefault(id(module), []).append(Place(block, use))
        self.bases = bases
        self.rows = rows
        self.sink = sink
        self.micro_batches = MicroBatches()
        self.calls: Counter[str] = Counter()  # forwards so far, by block
        self.arrived: list[Call] = []  # complete, their statistics are still to be made
        self.queued_in = -1  # the backward at whose end they will be made
        self.delivered: set[str] = set()
        self.unsampled: set[str] = set()
        self.differentiated: set[str] = set()  # gradients arrived with create_graph=True
        # Where the gradients of the outputs arrive, for `Capture.sample`.  Edges rather than the
        # outputs: an in-place operation (ReLU(inplace=True)) makes the output another tensor, the
        # edge stays where the module ended.
        self.edges: dict[Call, GradientEdge] = {}

    def check_sampled(self, fisher_type: str) -> None:
        """Raises `CaptureError` where a backward came without `Capture.sample`."""
        if self.unsampled:
            raise CaptureError(
                f"fisher_type={fisher_type!r}: a backward() came without sample() for the blocks "
                f"{', '.join(sorted(self.unsampled))}. Call sample(logits, likelihood) between "
                "forward and backward(), for every micro-batch; activation checkpoints need "
                "use_reentrant=False"
            )

    def warn_of_lost(self) -> None:
        """Say of which blocks no other backward has come than those with create_graph=True."""
        lost = sorted(self.differentiated - self.delivered - self.unsampled)
        if lost:
            log.warning(
                "no statistics of %s: the backward ran with create_graph=True, which is taken for "
                "a part of the loss (a gradient penalty)",
                ", ".join(lost),
            )
