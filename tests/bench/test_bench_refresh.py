"""`bench refresh`: what it times is a refresh, and its residuals are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_runs import bench, check_spread

from distcurv.bench import refresh_cases as cases


def test_a_tiny_run(tmp_path: Path) -> None:
    content = bench(
        tmp_path, "refresh", "--dims", "16,48", "--ranks", "4,16", "--blocks", "1,3",
        "--repetitions", "2",
    )  # fmt: skip
    # r = 16 at d = 16 is no low rank and has no row.
    sizes = [(row["d"], row["blocks"], row["r"]) for row in content["results"]]
    assert sizes == [(16, 1, 4), (16, 3, 4), (48, 1, 4), (48, 1, 16), (48, 3, 4), (48, 3, 16)]
    for row in content["results"]:
        for name in ("refresh", "eigh", "cholesky"):
            check_spread(row["ms_per_block"][name])
        check_spread(row["gflops"])
        check_spread(row["matmul_gflops"])
        middle = {name: row["ms_per_block"][name]["median"] for name in row["ms_per_block"]}
        assert row["speedup_over_eigh"] == pytest.approx(middle["eigh"] / middle["refresh"])
        assert (row["residual"] is not None) == (row["blocks"] == 1)
        if row["residual"] is not None:
            best = row["residual"]["best"]
            assert all(best <= value * (1 + 1e-6) < 1 for value in row["residual"].values())


def test_at_nearly_full_rank_little_is_lost() -> None:
    case = cases.make_case(24, 23, 1, "cpu", tail="none")
    assert cases.best_residual(case) < 0.02
    assert cases.low_rank_residual(case) < 0.05
    assert cases.cold_residual(case, 2) == pytest.approx(cases.best_residual(case), rel=1e-2)


def test_the_exact_factor_is_the_weighted_mean_of_the_windows() -> None:
    """Its trace must be the refreshed version's, which is exact at any rank."""
    case = cases.make_case(32, 8, 2, "cpu")
    published = cases.refresh(case)
    torch.testing.assert_close(published["F.trace"][0], case.factor_dd.trace(), rtol=1e-4, atol=0.0)
    assert published["F.U"].shape == (2, 32, 8)
