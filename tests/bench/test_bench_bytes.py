"""`bench bytes` against numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_runs import bench

from distcurv.bench.block_presets import PRESETS, Shape, parse_shapes
from distcurv.bench.bytes_command import block_bytes


def test_lowrank_soap_by_hand() -> None:
    row = block_bytes(Shape("w", 100, 200), 8, "lowrank-soap")
    # Y 200×8 and 100×8, a trace and a count for each side, and the steps.
    assert row["sketch_statistic"] == 4 * (200 * 8 + 100 * 8 + 2 + 2 + 1)
    # U, λ (8 each), one number for each tail, trace and weight for each side.
    assert row["sketch_preconditioner"] == 4 * (200 * 8 + 100 * 8 + 16 + 2 + 2 + 2)
    # As float16 Y and U take half, and a scale for each column; all else is as it was.
    assert row["narrow_statistic"] == 2 * (200 * 8 + 100 * 8) + 4 * (16 + 2 + 2 + 1)
    assert row["narrow_preconditioner"] == 2 * (200 * 8 + 100 * 8) + 4 * (16 + 16 + 2 + 2 + 2)
    # Packed triangles, a count for each side, and the steps; back: trace, damping, weight.
    triangles = 200 * 201 // 2 + 100 * 101 // 2
    assert row["dense_statistic"] == 4 * (triangles + 2 + 1)
    assert row["dense_preconditioner"] == 4 * (triangles + 6)
    assert row["full"] == 2 * 4 * (200**2 + 100**2)
    sketch = row["sketch_statistic"] + row["sketch_preconditioner"]
    narrow = row["narrow_statistic"] + row["narrow_preconditioner"]
    dense = row["dense_statistic"] + row["dense_preconditioner"]
    assert row["ratio"] == pytest.approx(dense / sketch, rel=1e-12)
    assert row["ratio_to_full"] == pytest.approx(row["full"] / sketch, rel=1e-12)
    assert row["narrow_ratio"] == pytest.approx(dense / narrow, rel=1e-12)
    assert row["narrow_ratio_to_full"] == pytest.approx(row["full"] / narrow, rel=1e-12)


def test_kfac_has_a_bias_coordinate_and_a_diagonal_tail() -> None:
    row = block_bytes(Shape("w", 100, 200), 8, "kfac")
    assert row["sketch_statistic"] == 4 * (201 * 8 + 100 * 8 + 100 + 2 + 2 + 1)
    assert row["sketch_preconditioner"] == 4 * (201 * 8 + 100 * 8 + 16 + 1 + 100 + 2 + 2)
    assert row["narrow_preconditioner"] == row["sketch_preconditioner"] - 2 * 301 * 8 + 4 * 16
    assert row["full"] == 2 * 4 * (201**2 + 100**2)


def test_a_narrow_side_travels_dense() -> None:
    row = block_bytes(Shape("w", 10, 200), 16, "lowrank-soap")
    assert row["encodings"] == ["sketch", "dense"]
    assert row["sketch_statistic"] == 4 * (200 * 16 + 2 + 55 + 1 + 1)
    assert row["sketch_preconditioner"] == 4 * (200 * 16 + 10 * 10 + 26 + 2 + 2 + 2)
    # And stays float32: the dense side's eigenbasis too.
    assert row["narrow_statistic"] == row["sketch_statistic"] - 2 * 200 * 16 + 4 * 16
    assert row["narrow_preconditioner"] == row["sketch_preconditioner"] - 2 * 200 * 16 + 4 * 16


def test_bert_large_by_hand(tmp_path: Path) -> None:
    content = bench(tmp_path, "bytes")
    assert content["settings"] == {"model": "bert-large", "rank": 128, "rule": "lowrank-soap"}
    attention, up, down = content["results"]
    assert (attention["count"], up["count"], down["count"]) == (96, 24, 24)
    assert attention["sketch_statistic"] == 4 * (2 * 1024 * 128 + 5)
    assert up["sketch_statistic"] == down["sketch_statistic"] == 4 * (5 * 1024 * 128 + 5)
    total = content["total"]
    assert total["sketch_statistic"] == 4 * (96 * (2 * 1024 * 128 + 5) + 48 * (5 * 1024 * 128 + 5))
    triangle, wide = 1024 * 1025 // 2, 4096 * 4097 // 2
    assert total["dense_statistic"] == 4 * (96 * (2 * triangle + 3) + 48 * (triangle + wide + 3))
    assert total["full"] == 8 * (96 * 2 * 1024**2 + 48 * (1024**2 + 4096**2))
    # The goal, against the stricter of the two dense baselines.
    assert total["narrow_ratio"] > 15


def test_given_shapes(tmp_path: Path) -> None:
    content = bench(tmp_path, "bytes", "--shapes", "100x200, 64x32*3", "--rank", "8")
    assert [row["count"] for row in content["results"]] == [1, 3]
    assert content["command"].endswith(f"--rank 8 --rule lowrank-soap --out {tmp_path}")
    expected = block_bytes(Shape("x", 100, 200), 8, "lowrank-soap")["sketch_statistic"]
    expected += 3 * block_bytes(Shape("x", 64, 32), 8, "lowrank-soap")["sketch_statistic"]
    assert content["total"]["sketch_statistic"] == expected


def test_presets_are_the_models_of_bench_step() -> None:
    from distcurv.bench.step_models import make_problem
    from distcurv.optim.matrices import matrix_shape

    for name in ("autoencoder", "charlm"):
        found: dict[tuple[int, int], int] = {}
        for parameter in make_problem(name, "cpu").model.parameters():
            shape = matrix_shape(parameter)
            if shape is not None:
                found[shape] = found.get(shape, 0) + 1
        listed: dict[tuple[int, int], int] = {}
        for shape_ in PRESETS[name]:
            key = (shape_.out, shape_.into)
            listed[key] = listed.get(key, 0) + shape_.count
        assert found == listed


def test_parse_shapes() -> None:
    assert parse_shapes("3x4,5x6*7") == [Shape("3x4", 3, 4), Shape("5x6", 5, 6, 7)]
