"""Past the last node of a DistributedDataParallel's forward.

With ``static_graph`` (in the first iteration) and ``find_unused_parameters`` the wrapper ends its
forward with a node of its own, `_DDPSink`.  The first gradient that passes it starts the reduction
of all gradients at the end of that backward: it must be the training loss's, so curvature enters
the graph below.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from distcurv.errors import CaptureError

_SINK = "_DDPSinkBackward"
# So far from the logits a sink is looked for: there are only a loop's own operations between.
_NODES = 64


def below_sink(logits: Tensor) -> GradientEdge:
    """Where the gradient of the logits enters the model.

    Raises `CaptureError` when a sink that waits for its first gradient is further below."""
    edge = get_gradient_edge(logits)
    if edge.node.name() == _SINK:
        # Its outputs are its inputs after the first, of any type; the edges are of tensors alone.
        before = sum(edge.node.needs_input_grad[1 : edge.output_nr + 1])  # type: ignore[attr-defined]
        edges = [(node, number) for node, number in edge.node.next_functions if node is not None]
        return GradientEdge(*edges[before])
    if any(node.name() == _SINK and _waits(node) for node in _around(edge.node)):
        raise CaptureError(
            "the model is a DistributedDataParallel with static_graph=True in its first iteration: "
            "give the Fisher types mc and exact the very tensor that it returned, not one "
            "computed from it"
        )
    return edge


def _waits(sink: Node) -> bool:
    """Whether a gradient that passes the sink would start the reduction."""
    model = sink.ddp_weakref()  # type: ignore[attr-defined]
    return bool(model.static_graph and not model._static_graph_delay_allreduce_enqueued)


def _around(node: Node) -> list[Node]:
    """The nodes next to it, nearest first."""
    seen = {node}
    waiting = deque(seen)
    while waiting and len(seen) < _NODES:
        for below, _ in waiting.popleft().next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return list(seen)
