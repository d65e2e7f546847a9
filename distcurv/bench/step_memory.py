"""The memory of one method, measured where nothing else is: in a process of its own.

Run as ``python -m distcurv.bench.step_memory JSON``; prints what it found as JSON, in its last
line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from distcurv.errors import LaunchError


def memory_of(request: dict[str, Any]) -> dict[str, Any]:
    """A process trains with one method; ``request`` as `main` reads it.

    Returns:
        ``peak_bytes``: the largest size of the process, on CUDA of its tensors there.
        ``held_bytes``: tensors alive between two steps but for model and batch, at the step of two
        intervals after which they were most; ``held_bytes_mean``: after the mean of those steps;
        ``held_bytes_by_place``: where the most were kept.
        ``sides``: the sum of Di + Do over the matrices that the method preconditions.

    Raises:
        LaunchError: the process failed; its last line says why.
    """
    command = [sys.executable, "-m", "distcurv.bench.step_memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LaunchError(f"measuring the memory of {request['method']} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def above(memory: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """``memory`` with what it is above the baseline's.

    ``numbers_per_side``: float32 numbers held above the baseline's, over the sum of Di + Do: r for
    each thin matrix of rank r that is kept for both sides of every block.
    ``numbers_per_side_by_place``: what is held in each place (not less the baseline's: SGD's own
    momentum is a place of the optimizer)."""
    sides = memory["sides"]
    return {
        **memory,
        "peak_bytes_above": memory["peak_bytes"] - baseline["peak_bytes"],
        "held_bytes_above": memory["held_bytes"] - baseline["held_bytes"],
        "numbers_per_side": (memory["held_bytes"] - baseline["held_bytes"]) / 4 / sides,
        "numbers_per_side_by_place": {
            place: nbytes / 4 / sides for place, nbytes in memory["held_bytes_by_place"].items()
        },
    }


def main(text: str) -> int:
    """Warm up one method, look at its tensors after each of some steps, print what was found."""
    from distcurv.bench.clock import choose_cores, one_thread, peak_memory, pinned
    from distcurv.bench.step_crew import Member, Variant, make_crew
    from distcurv.bench.step_held import Held, held
    from distcurv.bench.step_run import run_steps, warm_up

    request = json.loads(text)
    cores = choose_cores()
    samples: list[Held] = []

    def look(member: Member) -> None:
        problem = member.trainer.problem
        model = problem.model
        apart = [*model.parameters(), *model.buffers(), problem.inputs, problem.targets]
        samples.append(held(member.trainer.roots, apart, request["device"]))

    with (
        one_thread(),
        pinned(cores.training),
        make_crew(
            [Variant(request["method"], request["rank"], request["worker"])],
            request["model"],
            request["device"],
            cores,
            interval=request["interval"],
            capture_interval=request["capture_interval"],
        ) as (member,),
    ):
        warm_up(member, request["interval"])
        run_steps(member, 2 * request["interval"], lambda: look(member))
        peak = peak_memory(request["device"])
        most = max(samples, key=lambda sample: sample.total)
        found = {
            "peak_bytes": peak,
            "held_bytes": most.total,
            "held_bytes_mean": round(sum(sample.total for sample in samples) / len(samples)),
            "held_bytes_by_place": most.by_place,
            "sides": _sides(member),
        }
        print(json.dumps(found))
    return 0


def _sides(member: Any) -> int:
    from distcurv.optim.matrices import matrix_shape

    pipeline = member.trainer.pipeline
    if pipeline is not None:
        matrices = [spec for spec in pipeline.table.specs if len(spec.sides) == 2]
        return sum(side.dim for spec in matrices for side in spec.sides)
    shapes = [matrix_shape(p) for p in member.trainer.problem.model.parameters()]
    return sum(sum(shape) for shape in shapes if shape is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
