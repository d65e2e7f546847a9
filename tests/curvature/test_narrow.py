"""What travels as float16: taken apart and joined number by number, and what rounding may not do.

The oracles are the numbers themselves (columns over their largest, rounded by `Tensor.half`) and
dense float64 matrices. Rounding to float16 changes a number by 2⁻¹¹ of it at most, on average by a
third of that, and errors of different numbers cancel: eigenvalues are held to 0.02 % of the
largest, matrices to 0.2 % in the Frobenius norm, with two roundings of the largest direction.
"""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import pytest
import torch
from kind_cases import EXACT, low_rank_spec
from oracles import generator, orthogonality_error, orthonormal, psd, relative_error
from torch import Tensor

from distcurv.curvature import lowrank
from distcurv.curvature.ema import ema_weights
from distcurv.curvature.estimate import Estimate
from distcurv.curvature.inverse import invert_low_rank
from distcurv.curvature.kinds import KINDS
from distcurv.curvature.narrow import HALF_STEP, Sent, as_received, join, sent_sizes, settled, split
from distcurv.curvature.nystrom import nystrom
from distcurv.curvature.spec import BlockSpec, Layout, SideSpec, Tensors
from distcurv.errors import NumericsError, ShapeError

TAILS = ["none", "isotropic", "diagonal"]
each_tail = pytest.mark.parametrize("tail", TAILS)


def narrow(spec: BlockSpec) -> BlockSpec:
    return dataclasses.replace(spec, wire_dtype="float16")


def layouts_of(spec: BlockSpec) -> list[Layout]:
    kind = KINDS[spec.kind]
    return [kind.statistic_layout(spec), kind.published_layout(spec)]


def numbers(layouts: list[Layout], seed: int = 0) -> Tensor:
    return torch.randn(sum(layout.size for layout in layouts), generator=generator(seed))


# -- taken apart and joined -----------------------------------------------------------------


def test_in_float32_nothing_is_copied() -> None:
    layouts = layouts_of(low_rank_spec(2, "isotropic", "sketch"))
    flat = numbers(layouts)
    sent = split(layouts, flat)
    assert sent.payload is flat
    assert (sent.narrow.numel(), sent.narrow.dtype) == (0, torch.float16)
    for part, offset in zip(join(layouts, sent), (0, layouts[0].size), strict=True):
        assert part.data_ptr() == flat[offset:].data_ptr()


@each_tail
def test_only_sketches_and_bases_are_rounded(tail: str) -> None:
    # A dense side and a block that stays float32 among others, in one message.
    mixed = low_rank_spec(2, tail, "sketch")
    mixed = dataclasses.replace(
        mixed, sides=(mixed.sides[0], dataclasses.replace(mixed.sides[1], encoding="dense"))
    )
    specs = [
        narrow(low_rank_spec(3, tail, "sketch")),
        low_rank_spec(2, tail, "sketch"),
        narrow(mixed),
    ]
    names = [{"A.Y", "G.Y"}, set(), {"A.Y"}], [{"A.U", "G.U"}, set(), {"A.U"}]
    for which in (0, 1):
        layouts = [layouts_of(spec)[which] for spec in specs]
        assert [set(layout.narrow) for layout in layouts] == names[which]
        flat = numbers(layouts)
        sent = split(layouts, flat)
        assert (sent.payload.dtype, sent.narrow.dtype) == (torch.float32, torch.float16)
        assert (sent.payload.numel(), sent.narrow.numel()) == sent_sizes(layouts)
        assert sent.payload.nbytes + sent.narrow.nbytes == sum(one.nbytes for one in layouts)
        parts = torch.split(flat, [layout.size for layout in layouts])
        for layout, part, joined in zip(layouts, parts, join(layouts, sent), strict=True):
            assert joined.dtype == torch.float32
            got = layout.views(joined)
            for name, value in layout.views(part).items():
                scale = value.abs().amax(0) if name in layout.narrow else None
                rounded = value if scale is None else (value / scale).half().float() * scale
                assert torch.equal(got[name], rounded), name
                assert bool(((got[name] - value).abs() <= HALF_STEP * value.abs() + 1e-6).all())


def test_half_the_bytes_are_left_of_large_matrices() -> None:
    spec = BlockSpec("w", "lowrank", (SideSpec(1024, 128), SideSpec(4096, 128)), 0.9)
    for wide, half in zip(layouts_of(spec), layouts_of(narrow(spec)), strict=True):
        assert wide.nbytes == 4 * wide.size
        assert 0.5 < half.nbytes / wide.nbytes < 0.502


def test_joining_twice_changes_nothing_more() -> None:
    layouts = layouts_of(narrow(low_rank_spec(3, "diagonal", "sketch")))
    once = torch.cat(join(layouts, split(layouts, numbers(layouts))))
    assert torch.equal(torch.cat(join(layouts, split(layouts, once))), once)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_what_is_not_finite_stays_so(poison: float) -> None:
    (layout, _) = layouts_of(narrow(low_rank_spec(3, "isotropic", "sketch")))
    for place in range(layout.size):
        flat = torch.ones(layout.size)
        flat[place] = poison
        (got,) = join([layout], split([layout], flat))
        assert torch.isfinite(got).sum() == layout.size - (poison != 3.4e38)
        assert bool(torch.isfinite(got[place])) == (poison == 3.4e38)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_kinds_and_encodings_stay_float32(kind: str) -> None:
    for spec in EXACT[kind]:
        sketched = {name for name, side in spec.named_sides() if side.encoding == "sketch"}
        for layout, key in zip(layouts_of(narrow(spec)), ("Y", "U"), strict=True):
            assert set(layout.narrow) == {f"{name}.{key}" for name in sketched}
            assert kind == "lowrank" or not layout.narrow


def test_an_unknown_wire_dtype_is_refused() -> None:
    with pytest.raises(ShapeError, match="wire_dtype 'bfloat16': use one of float32, float16"):
        dataclasses.replace(low_rank_spec(2, "none", "sketch"), wire_dtype="bfloat16")


# -- orthonormal again ----------------------------------------------------------------------


def basis_layout(d: int, r: int) -> tuple[Layout, Tensor]:
    """A layout with one narrow basis, and a buffer that holds an orthonormal one."""
    layout = Layout({"F.U": (d, r), "F.lam": (r,)}, ["F.U"])
    U = orthonormal(d, r, seed=3).float()
    return layout, layout.pack({"F.U": U, "F.lam": torch.arange(r, 0, -1.0)})


@pytest.mark.parametrize(("d", "r"), [(1, 1), (8, 8), (40, 3), (256, 32)])
def test_a_basis_arrives_orthonormal_and_close_to_what_was_sent(d: int, r: int) -> None:
    layout, flat = basis_layout(d, r)
    sent = split([layout], flat)
    (raw,) = join([layout], sent)
    before = flat.clone()
    got = as_received(layout, sent)
    U, rounded = layout.views(got)["F.U"], layout.views(raw)["F.U"]
    if d > 1:  # a column of one number is ±1, which float16 has
        assert orthogonality_error(rounded) > 2e-5
    assert orthogonality_error(U) < 1e-6
    # Each column by its own rounding and what it has in common with those before it.
    change = torch.linalg.vector_norm(U - layout.views(before)["F.U"], dim=0)
    assert change.max() < 2 * HALF_STEP
    assert torch.equal(layout.views(got)["F.lam"], layout.views(before)["F.lam"])
    assert torch.equal(flat, before)
    assert torch.equal(as_received(layout, Sent(*(t.clone() for t in sent))), got)


def test_settling_gives_memory_of_its_own() -> None:
    for layout in layouts_of(low_rank_spec(2, "isotropic", "sketch")):
        flat = numbers([layout])
        got = settled(layout, flat)
        assert torch.equal(got, flat) and got.data_ptr() != flat.data_ptr()


@pytest.mark.parametrize("fault", ["dependent", "zero", "nan", "inf"])
def test_columns_that_are_no_basis_come_out_as_nan(fault: str) -> None:
    layout, flat = basis_layout(12, 3)
    U = layout.views(flat)["F.U"]
    if fault == "dependent":
        U[:, 2] = U[:, 0]
    elif fault == "zero":
        U[:, 1] = 0.0
    else:
        U[4, 1] = float(fault)
    assert not torch.isfinite(settled(layout, flat)).all()


def test_a_basis_that_is_only_rounded_would_turn_the_inverse_indefinite() -> None:
    """Why bases are put right: what stands beside the largest number is rounded up here, and the
    length of the column with it."""
    layout = Layout({"F.U": (200, 1)}, ["F.U"])
    column = torch.full((200,), 1.0 + 1.3 * HALF_STEP)
    column[0] = 2.0
    sent = split([layout], column / column.norm())

    def smallest(flat: Tensor) -> float:
        U = layout.views(flat)["F.U"]
        factor = Estimate(U, torch.ones(1), torch.tensor([1e-4]), torch.tensor(1.02))
        inverse = invert_low_rank(factor, torch.tensor(0.0)).dense().double()
        return float(torch.linalg.eigvalsh(inverse)[0])

    assert smallest(join([layout], sent)[0]) < -1
    assert smallest(as_received(layout, sent)) == pytest.approx(1.0, rel=0.02)


# -- a chain of refreshes -------------------------------------------------------------------


def factors(spectrum: str, d: int) -> list[Tensor]:
    """What each of six statistics is of: one spectrum, eigenvectors that stay or are the axes."""
    i = torch.arange(1.0, d + 1, dtype=torch.float64)
    lam = {"slow": 1 / i, "steep": i**-3.0, "deficient": torch.where(i < 4, 1 / i, 0.0)}
    values = lam[spectrum.removesuffix(" on the axes")].tolist()
    matrix = torch.diag(torch.tensor(values)) if "axes" in spectrum else psd(values, seed=1)
    return [matrix.double() * scale for scale in (1.0, 1.2, 0.9, 1.1, 1.0, 1.0)]


def carried(layout: Layout, tensors: Tensors, *, published: bool) -> Tensors:
    """Tensors of one block [1, ...] after they have travelled."""
    sent = split([layout], layout.pack(tensors)[0])
    flat = as_received(layout, sent) if published else join([layout], sent)[0]
    return {name: value.clone() for name, value in layout.views(flat.unsqueeze(0)).items()}


def refresh_chain(spec: BlockSpec, matrices: list[Tensor]) -> tuple[Tensors, Tensor]:
    """The last version, and the exact average that it stands for."""
    kind, side = KINDS["lowrank"], spec.sides[0]
    start = {name: value.unsqueeze(0) for name, value in kind.start(spec, 0).items()}
    state, basis = kind.seed(spec, start), start
    weight, exact = torch.zeros((), dtype=torch.float64), torch.zeros_like(matrices[0])
    for matrix in matrices:
        Q = basis["F.U"][0].double()
        # Twice, so that even the first is against a basis that has seen the matrix.
        Q = torch.linalg.qr(matrix @ Q + 1e-9 * Q).Q.float()
        basis = {**basis, "F.U": Q.unsqueeze(0)}
        statistic = {
            "F.Y": (matrix @ Q.double()).float().unsqueeze(0) * 5.0,
            "F.trace": matrix.trace().float().reshape(1) * 5.0,
            "F.count": torch.tensor([5.0]),
            "steps": torch.ones(1),
        }
        if side.tail == "diagonal":
            statistic["F.diag"] = matrix.diagonal().float().unsqueeze(0) * 5.0
        shares = ema_weights(spec.decay, torch.tensor(1.0), weight)
        weight = shares.weight
        exact = shares.old_share * exact + shares.new_share * matrix
        statistic = carried(kind.statistic_layout(spec), statistic, published=False)
        refreshed = kind.refresh(spec, state, statistic, basis)
        basis = carried(kind.published_layout(spec), refreshed.published, published=True)
        state = kind.seed(spec, basis)
    return {name: value[0] for name, value in basis.items()}, exact


@each_tail
@pytest.mark.parametrize("spectrum", ["slow", "steep", "deficient", "slow on the axes"])
@pytest.mark.parametrize(("d", "r"), [(48, 8), (20, 14)], ids=["fast", "reference"])
def test_a_chain_of_refreshes_is_as_good_as_in_float32(
    tail: str, spectrum: str, d: int, r: int
) -> None:
    matrices = factors(spectrum, d)
    wide_spec = BlockSpec("w", "lowrank", (SideSpec(d, r, tail, "sketch"),), 0.9)
    wide, exact = refresh_chain(wide_spec, matrices)
    half, _ = refresh_chain(narrow(wide_spec), matrices)
    lam, V = torch.linalg.eigh(exact)
    lam, V = lam.flip(0), V.flip(-1)

    def residual(version: Tensors) -> float:
        U = version["F.U"].double()
        return relative_error((U * version["F.lam"].double()) @ U.mT, exact)

    assert residual(half) < 1.01 * residual(wide) + 2e-3
    # Where few directions are left, an isotropic tail is a small difference of large numbers that
    # decides which of the last eigenvalues are raised to it.
    undecided = tail == "isotropic" and 2 * r > d
    slack = 1e-2 if undecided else 2e-4
    assert (half["F.lam"] - wide["F.lam"]).abs().max() < slack * lam[0]
    assert orthogonality_error(half["F.U"]) < 1e-6
    # Half of the directions, down to 1/343 of the largest, are held as well as in float32.
    kept = [k for k in range(r // 2) if lam[k] > 1e-4 * lam[0]]
    lost_wide, lost_half = (
        1 - (version["F.U"].double().mT @ V[:, kept]).square().sum(0) for version in (wide, half)
    )
    assert lost_half.max() < 1.2 * lost_wide.max() + (2e-3 if undecided else 1e-4)
    # Nothing that was counted is lost: eigenvalues and tail make the trace, but for the rounding.
    d_tail = {"none": None, "isotropic": d - r, "diagonal": 1}[tail]
    if d_tail is not None:
        total = half["F.lam"].sum() + half["F.tail"].sum() * d_tail
        assert float(total) == pytest.approx(float(exact.trace()), rel=5e-3)
    assert float(half["F.trace"]) == pytest.approx(float(exact.trace()), rel=1e-6)


@each_tail
@pytest.mark.parametrize("spectrum", ["slow", "steep", "slow on the axes"])
def test_the_applied_inverse_is_that_of_the_average(tail: str, spectrum: str) -> None:
    """Factor and damping times the damped inverse, against the identity."""
    d = 20
    spec = BlockSpec("w", "lowrank", (SideSpec(d, d, tail, "sketch"),), 0.9)
    half, exact = refresh_chain(narrow(spec), factors(spectrum, d))
    damping = 1e-3 * float(exact.trace())
    (inverse,) = KINDS["lowrank"].inverses(narrow(spec), half, damping, relative=False)
    product = inverse.dense().double() @ (exact + damping * torch.eye(d, dtype=torch.float64))
    # The largest direction, up to 830 times the damping, is turned by 2e-4: times the root of 830
    # that is 0.6 % for one direction, and several are turned.
    assert torch.linalg.eigvals(product).real.min() > 0.95
    assert torch.linalg.eigvals(product).real.max() < 1.05
    assert torch.linalg.eigvalsh(inverse.dense().double()).min() > 0


@each_tail
def test_the_fast_way_is_taken(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Mock(side_effect=AssertionError("nystrom was called"))
    monkeypatch.setattr(lowrank, "nystrom", reference)
    spec = narrow(BlockSpec("w", "lowrank", (SideSpec(48, 8, tail, "sketch"),), 0.9))
    for spectrum in ("slow", "steep", "slow on the axes"):
        refresh_chain(spec, factors(spectrum, 48))
    assert not reference.called


@pytest.mark.parametrize("seed", range(4))
def test_room_for_the_noise_is_needed(seed: int) -> None:
    """A matrix of rank 3 against a random basis of 16: all else in the core is rounding (here that
    of bfloat16, with which it shows at once)."""
    A = psd([1.0, 0.5, 0.2] + [0.0] * 61, seed=seed)
    Q = orthonormal(64, 16, seed=seed + 10).float()
    Y = (A @ Q.double()).bfloat16().float()
    U, lam = nystrom(Y, Q, noise=2.0**-8)
    got = (U.double() * lam) @ U.double().mT
    assert relative_error(got, A) < 0.05
    try:
        U, lam = nystrom(Y, Q)
    except NumericsError:
        return
    assert relative_error((U.double() * lam) @ U.double().mT, A) > 0.05


@pytest.mark.parametrize("order", [1, -1], ids=["descending", "ascending"])
def test_the_smaller_of_two_columns_is_believed_in_either_order(order: int) -> None:
    """One large eigenvalue, and eigenvectors of four numbers each: what rounding adds to the large
    column looks like the small ones, whose eigenvalues it must not be divided by."""
    d, r = 32, 8
    V = torch.block_diag(*orthonormal(4, 4, seed=1, batch=(d // 4,)))
    lam = torch.full((d,), 1e-8, dtype=torch.float64)
    lam[0] = 1.0
    A = (V * lam) @ V.mT
    noise = torch.randn(d, r, generator=generator(2), dtype=torch.float64)
    Q = torch.linalg.qr(V[:, :r] + 1e-8 * noise).Q
    Q = Q.flip(-1).contiguous() if order < 0 else Q
    scale = (A @ Q).abs().amax(0)
    Y = (A @ Q / scale).half().double() * scale
    got = nystrom(Y.float(), Q.float(), noise=HALF_STEP).lam_r
    assert got[0].item() == pytest.approx(1.0, rel=1e-3)
    assert got[1:].max() < 1e-5
