"""nn.MultiheadAttention: its projections are Linear layers on rows of its parameters.

The module passes its weights to one function, so no module runs whose output could be watched;
the projections are captured where that function calls `F.linear` (see
`distcurv.train.function_calls`).
"""

from __future__ import annotations

from torch import nn

from distcurv.layers.linear import LinearIO


def attention_parts(attention: nn.MultiheadAttention) -> list[tuple[str, LinearIO]]:
    """(name, layer) of the projections of query, key and value.  (That of the output is a module
    of its own.)"""
    size = attention.embed_dim
    if attention._parameters["in_proj_weight"] is None:
        bias = "in_proj_bias"
        # Three weights share one bias vector: its rows go with them.
        return [
            ("q_proj", LinearIO("q_proj_weight", bias, bias_rows=(0, size))),
            ("k_proj", LinearIO("k_proj_weight", bias, bias_rows=(size, 2 * size))),
            ("v_proj", LinearIO("v_proj_weight", bias, bias_rows=(2 * size, 3 * size))),
        ]
    return [
        (f"{letter}_proj", LinearIO("in_proj_weight", "in_proj_bias", (i * size, (i + 1) * size)))
        for i, letter in enumerate("qkv")
    ]
