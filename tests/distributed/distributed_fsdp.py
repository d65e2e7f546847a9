"""Training runs with sharded parameters, and the same without: what ranks of a test job do.

The model has layers that are divided along outputs (Linear, attention with q, k and v in one
parameter), along inputs (Embedding, a transposed convolution with its bias) and along units
(LayerNorm); with three ranks some have uneven parts, and the last Linear has none for one rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_tasks import checksum
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distcurv import KfacConfig, LowRankSOAP, Preconditioner
from distcurv.errors import ConfigError
from distcurv.makers import (
    GradientMaker,
    KfacGradientMaker,
    NewtonGradientMaker,
    PreconditioningConfig,
    SengGradientMaker,
    ShampooGradientMaker,
)
from distcurv.train import shard_sums

Result = dict[str, Any]

ROWS = 24  # of a step's batch, for 1, 2, 3 and 4 ranks
TOKENS, IDS, WIDTH = 3, 8, 6
STEPS = 18

_SERVICE: Result = {
    "preconditioner_upd_interval": 4,
    "curvature_upd_interval": 2,
    "early_steps": 8,
    "install_delay": 1,
    "encoding": "sketch",
    "max_rows": None,
}
# eps and rank: see `distributed_tasks.DOORS`.
DOORS: dict[str, Result] = {
    "kfac": {"rank": 3, "damping": 0.1},
    "kfac-clip": {"rank": 3, "damping": 0.1, "kl_clip": 1e-4, "lr": 0.05},
    "kfac-graft": {"rank": 3, "damping": 0.1, "graft": True, "tail_in": "diagonal"},
    "kfac-other-tails": {"rank": 2, "damping": 0.1, "tail_in": "none", "tail_out": "isotropic"},
    "soap": {"rank": 2, "eps": 1e-2},
    "soap-full": {"rank": 32, "eps": 1e-1},
    "soap-activations": {"rank": 2, "eps": 1e-2, "source": "activations"},
}


class Model(nn.Module):
    """Tokens [N, TOKENS] to [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(IDS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.widen = nn.ConvTranspose1d(WIDTH, 5, 2)
        self.hidden = nn.Linear(5, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = torch.tanh(self.widen(x.mT)).mean(-1)
        return self.head(torch.tanh(self.hidden(x)))


def make_model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Model()


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(700 + step)
    ids = torch.randint(IDS, (ROWS, TOKENS), generator=random)
    return ids, torch.stack([ids.float().mean(1).cos(), ids[:, 0].float().sin()], 1)


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, all of it (on all ranks together where it is sharded)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Run:
    """One training run; sharded over a mesh, or whole where there is none."""

    def __init__(
        self,
        door: str,
        mesh: DeviceMesh | None,
        *,
        low: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        **settings: Any,
    ) -> None:
        self.scaler = scaler if scaler is not None else torch.amp.GradScaler("cpu", enabled=False)
        self.ranks = dist.get_world_size() if mesh is not None else 1
        self.rank = dist.get_rank() if mesh is not None else 0
        self.model = make_model()
        if mesh is not None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None)
            for module in self.model.children():
                fully_shard(module, mesh=mesh, mp_policy=policy)
            fully_shard(self.model, mesh=mesh, mp_policy=policy)
        settings = {**_SERVICE, **DOORS[door], **settings}
        self.base: torch.optim.Optimizer | None = None
        self.door: Preconditioner | LowRankSOAP
        if door.startswith("kfac"):
            self.base = torch.optim.SGD(self.model.parameters(), lr=0.05)
            config = KfacConfig(**settings)
            self.door = Preconditioner(self.model, config, "inline", grad_scaler=scaler)
        else:
            self.door = LowRankSOAP(
                self.model, lr=0.01, workers="inline", grad_scaler=scaler, **settings
            )
        self.step_count = 0

    def backward(self) -> float:
        rows = ROWS // self.ranks
        ids, targets = (t[self.rank * rows :][:rows] for t in make_batch(self.step_count))
        self.model.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.model(ids).float(), targets)
        self.scaler.scale(loss).backward()
        self.step_count += 1
        return loss.item()

    def update(self) -> None:
        if isinstance(self.door, Preconditioner):
            assert self.base is not None
            self.scaler.unscale_(self.base)
            self.door.step()
        self.scaler.step(self.door if self.base is None else self.base)
        self.scaler.update()

    def steps(self, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            losses.append(self.backward())
            self.update()
        return losses

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.door.close()

    def params(self) -> dict[str, Tensor]:
        return {name: whole(param) for name, param in self.model.named_parameters()}


def make_mesh(kind: str) -> DeviceMesh:
    if kind == "fsdp":
        return init_device_mesh("cpu", (dist.get_world_size(),))
    sizes = (2, dist.get_world_size() // 2)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))


def trained(door: str, mesh: DeviceMesh | None) -> Result:
    """Parameters after some steps, what the next step does with the gradient, and the log."""
    with Run(door, mesh) as run:
        run.steps(STEPS)
        run.backward()
        before = run.params()
        run.door.step()
        grads = {
            name: whole(param.grad)
            for name, param in run.model.named_parameters()
            if param.grad is not None
        }
        moved = {name: before[name] - param for name, param in run.params().items()}
        log = [list(record) for record in run.door.install_log]
    return {"params": before, "changed": moved if run.base is None else grads, "log": log}


def sharded(save: Callable[[Any], None], door: str, kind: str) -> Result:
    result = trained(door, make_mesh(kind))
    save(result)
    return {"log": result["log"]}


def sharded_wire(save: Callable[[Any], None], door: str) -> Result:
    """What ten steps after the early phase sum up, in numbers, by step."""
    sent: list[list[int]] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[-1].append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with Run(door, make_mesh("fsdp")) as run:
        run.steps(8)
        for _ in range(8):
            run.backward()
            sent.append([])
            # The pipeline's own collectives are those of training ranks as ever.
            own = uncounted(run, all_reduce)
            with (
                patch.object(shard_sums.dist, "all_reduce", counted),
                patch.object(run.door._pipeline, "step", own),
            ):
                run.door.step()
            run.model.zero_grad()
    return {"sent": sent}


def uncounted(run: Run, all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    pipeline = run.door._pipeline
    assert pipeline is not None
    step = pipeline.step

    def stepped(*args: Any) -> Any:
        with patch.object(dist, "all_reduce", all_reduce):
            return step(*args)

    return stepped


def sharded_resumed(save: Callable[[Any], None], door: str) -> Result:
    """Save and load this rank's state in the middle; the bits of the end with and without."""
    ends = []
    saved: Result = {}
    # What the last closed window made is installed at step 12: nothing is under way after it.
    settings: Result = {"install_delay": 0, "curvature_upd_interval": 1}
    for resumed in (False, True):
        with Run(door, make_mesh("fsdp"), **settings) as run:
            if resumed:
                run.model.load_state_dict(saved["model"])
                run.door.load_state_dict(saved["door"])
                run.step_count = 13
            else:
                run.steps(13)
                saved = copy.deepcopy(
                    {"model": run.model.state_dict(), "door": run.door.state_dict()}
                )
            run.steps(6)
            ends.append([p.to_local().clone() for p in run.model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    refused = ""
    if door == "soap":
        with Run(door, make_mesh("fsdp")) as run:
            for state in saved["door"]["state"].values():
                if "rows" in state:
                    state["rows"] = (state["rows"][0] + 1, state["rows"][1] + 1)
            try:
                run.door.load_state_dict(saved["door"])
            except Exception as error:  # noqa: BLE001 - told to the test, which judges it
                refused = f"{type(error).__name__}: {error}"
    return {"same": same, "refused": refused}


def sharded_low(save: Callable[[Any], None], door: str) -> Result:
    """Parameters in bfloat16 while layers run."""
    with Run(door, make_mesh("fsdp"), low=True) as run:
        return {"losses": run.steps(24), "versions": run.door.metrics()["versions_installed"]}


def sharded_overflow(save: Callable[[Any], None], door: str) -> Result:
    """One rank's loss overflows at some steps, and only in rows of a weight that rank 0 holds;
    what is installed in the end, and with the same steps left out."""
    found: Result = {}
    for overflowing in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with Run(door, make_mesh("fsdp"), scaler=scaler) as run:
            for number in range(STEPS):
                if number not in (2, 9):
                    run.steps(1)
                elif overflowing:
                    with spoilt_rows(run):
                        run.steps(1)
                else:  # a step without a backward
                    run.step_count += 1
                    run.model.zero_grad(set_to_none=True)
                    run.door.step()
            pipeline = run.door._pipeline
            assert pipeline is not None
            flats = [install.flat for install in pipeline.installed]
            params = list(run.params().values())
            found["with" if overflowing else "without"] = checksum([*flats, *params])
            found["counted" if overflowing else "none"] = run.door.metrics()["statistics_nonfinite"]
            found["log"] = [list(record) for record in run.door.install_log]
    return found


@contextmanager
def spoilt_rows(run: Run) -> Iterator[None]:
    """On rank 1 the gradients of the embedding's first ids are not finite: with two ranks rank 0
    has all their rows.  No layer is below the embedding."""

    def spoil(module: nn.Module, args: Any, out: Tensor) -> None:
        if run.rank == 1 and out.requires_grad:
            factor = (args[0] < IDS // 2).unsqueeze(-1) * 1e38 + 1.0
            out.register_hook(lambda grad: grad * factor * factor)

    handle = run.model.embed.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def sharded_refusals(save: Callable[[Any], None]) -> Result:
    """What cannot be: the texts of the errors."""
    mesh = make_mesh("fsdp")
    texts = {}
    for name, door, settings in (
        *(
            (kind, "kfac", {"kind": kind, "encoding": "auto"})
            for kind in ("dense", "kfe", "layer_wise", "full")
        ),
        ("encoding", "soap", {"encoding": "dense"}),
    ):
        try:
            Run(door, mesh, **settings)
        except Exception as error:  # noqa: BLE001 - told to the test, which judges it
            texts[name] = f"{type(error).__name__}: {error}"
    model = make_model()
    fully_shard(model, mesh=mesh)
    makers: dict[str, Callable[..., GradientMaker]] = {
        "NewtonGradientMaker": NewtonGradientMaker,
        "SengGradientMaker": SengGradientMaker,
        "ShampooGradientMaker": ShampooGradientMaker,
        "KfacGradientMaker": partial(KfacGradientMaker, swift=True),
    }
    for name, maker in makers.items():
        try:
            maker(model, PreconditioningConfig())
        except ConfigError as error:
            texts[name] = f"ConfigError: {error}"
    return texts


FSDP_FUNCTIONS = (
    sharded,
    sharded_wire,
    sharded_resumed,
    sharded_low,
    sharded_overflow,
    sharded_refusals,
)
