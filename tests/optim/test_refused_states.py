"""LowRankSOAP.load_state_dict: a state that does not fit changes nothing at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcurv.errors import StateError
from distcurv.optim import LowRankSOAP


def train(model: nn.Module, optimizer: LowRankSOAP, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()


def test_other_param_groups_leave_the_run_as_it_was() -> None:
    first, second = nn.Linear(6, 4), nn.Linear(6, 4)
    groups = [{"params": [("weight", second.weight)]}, {"params": [("bias", second.bias)]}]
    settings = {"workers": "inline", "rank": 2}
    with LowRankSOAP(first, **settings) as one, LowRankSOAP(groups, **settings) as two:
        train(first, one, 9)
        train(second, two, 4)
        log, step = two.install_log, two.metrics()["step"]
        with pytest.raises(StateError, match=r"groups of \[2\] parameters, the optimizer of"):
            two.load_state_dict(one.state_dict())
        assert two.install_log == log
        assert two.metrics()["step"] == step
        train(second, two, 4)


def test_a_state_without_one_of_its_fields_leaves_the_run_as_it_was() -> None:
    """As a version saved it that did not have the field."""
    model = nn.Linear(6, 4)
    with LowRankSOAP(model, workers="inline", rank=2) as optimizer:
        train(model, optimizer, 9)
        old = optimizer.state_dict()
        old["state"] = {index: dict(own) for index, own in old["state"].items()}
        del old["state"][0]["v_parts"]
        train(model, optimizer, 2)
        log, step = optimizer.install_log, optimizer.metrics()["step"]
        with pytest.raises(StateError, match="state of weight has no v_parts: it was saved by"):
            optimizer.load_state_dict(old)
        assert (optimizer.install_log, optimizer.metrics()["step"]) == (log, step)
        train(model, optimizer, 2)
