"""Minimal recurrences computed at once are the loop over their steps: in torch, and in the compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from elman.models import scan
from elman.models.cells import CELLS, unroll
from elman.models.fused import Resets, Rows
from elman.models.scan import GATES, is_scanned, linear_recurrence, minimal_gates, scanned_window
from elman.models.state import pieces
from kernel_support import BUILDS, library_of, random_layer, weights_of

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 100, 4096]
I, V = 12, 7  # noqa: E741
every_kind = pytest.mark.parametrize("kind", GATES)


def loop(keep_BTH: Tensor, add_BTH: Tensor, h_BH: Tensor) -> Tensor:
    """The recurrence as it is defined."""
    outputs = []
    for keep_BH, add_BH in zip(keep_BTH.unbind(1), add_BTH.unbind(1), strict=True):
        h_BH = keep_BH * h_BH + add_BH
        outputs.append(h_BH)
    return torch.stack(outputs, dim=1)


def coefficients(length: int, batch_size: int = 2, hidden_size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (batch_size, length, hidden_size)
    keep_BTH = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    add_BTH = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return keep_BTH, add_BTH, torch.randn(batch_size, hidden_size, dtype=torch.float64, requires_grad=True)


# In torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_the_loop_forward_and_in_every_gradient(length: int) -> None:
    given = coefficients(length)
    found_BTH, expected_BTH = linear_recurrence(*given), loop(*given)
    torch.testing.assert_close(found_BTH, expected_BTH, rtol=0, atol=1e-10)
    factors_BTH = torch.randn_like(found_BTH)
    found = torch.autograd.grad((found_BTH * factors_BTH).sum(), given)
    expected = torch.autograd.grad((expected_BTH * factors_BTH).sum(), given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_scan_passes_gradcheck(length: int) -> None:
    assert torch.autograd.gradcheck(linear_recurrence, coefficients(length))


@every_kind
@pytest.mark.parametrize("length", [1, 3, 17, 4096])
def test_layer_equals_the_written_out_cell_at_any_length_and_in_windows(kind: str, length: int) -> None:
    layer, x_BTI, state = random_layer(kind, I, 5), torch.randn(2, length, I).double(), (torch.randn(2, 5).double(),)
    expected_BTH, expected_state = unroll(CELLS[kind], x_BTI, state, weights_of(layer))
    parts = []
    for window_BTI in x_BTI.split(-(-length // 2), dim=1):
        part_BTH, state = layer(window_BTI, state)
        parts.append(part_BTH)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTH, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-10)


EXTREMES = (-200.0, -40.0, -10.0, 0.0, 10.0, 40.0, 200.0)


def extreme_gates(kind: str, *, same: bool) -> Tensor:
    """4,096 steps whose gates are shut or wide open: the same ones at every step, or each step others."""
    torch.manual_seed(0)
    units = len(EXTREMES) ** (GATES[kind] - 1)
    grid = torch.cartesian_prod(*[torch.tensor(EXTREMES)] * (GATES[kind] - 1)).view(units, -1).T
    gates_BTGH = torch.randn(1, 4096, GATES[kind], units)
    gates_BTGH[:, :, :-1] = grid if same else grid[:, torch.randint(units, (4096, units))].transpose(0, 1)
    return gates_BTGH.flatten(2)


@every_kind
@pytest.mark.parametrize("same", [True, False])
def test_gates_at_their_ends_stay_near_double_precision_over_4096_steps(kind: str, same: bool) -> None:
    gates_BTG = extreme_gates(kind, same=same).requires_grad_()
    h_BH = torch.randn(1, gates_BTG.shape[2] // GATES[kind]).requires_grad_()
    found_BTH = linear_recurrence(*minimal_gates(kind, gates_BTG), h_BH)
    expected_BTH = loop(*minimal_gates(kind, gates_BTG.double()), h_BH.double())
    torch.testing.assert_close(found_BTH.double(), expected_BTH, rtol=0, atol=1e-3)  # what is kept is rounded each time
    found = torch.autograd.grad(found_BTH.mean(), (gates_BTG, h_BH))
    expected = torch.autograd.grad(expected_BTH.mean(), (gates_BTG, h_BH))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


# Compiled -------------------------------------------------------------------------------


@pytest.fixture(params=BUILDS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel in both of its builds."""
    kernels = library_of(scan.SOURCE, request.param)
    monkeypatch.setattr(scan, "_kernels", lambda: kernels)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Case:
    """Random weights, state and inputs of one layer."""

    def __init__(
        self, kind: str, batch_size: int, length: int, hidden_size: int, *, rows: bool, resets: float = 0
    ) -> None:
        self.kind = kind
        self.layer = random_layer(kind, I, hidden_size).float()
        with torch.no_grad():  # the slope of g jumps at 0, where rounding decides: candidates stay on either side
            for parameter in self.layer.weights.parameters():
                parameter *= 0.5
            self.layer.weights.bias_ih_l0[-hidden_size:] += 5 * torch.randn(hidden_size).sign()
        self.given = torch.randn(V, I).requires_grad_() if rows else torch.randn(batch_size, length, I).requires_grad_()
        self.index = torch.randint(V, (batch_size, length)) if rows else None
        self.h_BH = torch.randn(batch_size, hidden_size).requires_grad_()
        self.where_BT = torch.rand(batch_size, length) < resets
        self.start_1H = torch.randn(1, hidden_size).requires_grad_()
        self.d_outputs, self.d_last = torch.randn(batch_size, length, hidden_size), torch.randn(batch_size, hidden_size)

    def results(self, *, bf16: bool = False) -> list[Tensor]:
        """Outputs, last state, and every gradient, by the kernel."""
        leaves = (self.given, self.h_BH, self.start_1H, *self.layer.parameters())
        resets = Resets(self.where_BT, (self.start_1H,)) if self.where_BT.any() else None
        x = self.given if self.index is None else Rows(self.given, self.index)
        weights = [weight.float() for weight in weights_of(self.layer)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out_BTH, (last_BH,) = scanned_window(self.kind, x, (self.h_BH,), weights, resets)
        return self._results(out_BTH, last_BH, leaves)

    def expected(self) -> list[Tensor]:
        """The same in torch and double precision."""
        layer = random_layer(self.kind, I, self.layer.hidden_size)
        layer.load_state_dict(self.layer.state_dict())
        leaves = [leaf.detach().double().requires_grad_() for leaf in (self.given, self.h_BH, self.start_1H)]
        given, last_BH, start_1H = leaves
        x_BTI, outputs = given if self.index is None else given[self.index], []
        for begin, end, rows_B in pieces(self.where_BT):
            if rows_B is not None:
                last_BH = torch.where(rows_B.unsqueeze(1), start_1H, last_BH)
            out_BTH, (last_BH,) = layer(x_BTI[:, begin:end], (last_BH,))
            outputs.append(out_BTH)
        return self._results(torch.cat(outputs, dim=1), last_BH, (*leaves, *layer.parameters()))

    def _results(self, out_BTH: Tensor, last_BH: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        loss = (out_BTH.to(last_BH.dtype) * self.d_outputs).sum() + (last_BH * self.d_last).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=not self.where_BT.any())
        return [part.detach() for part in (out_BTH, last_BH, *gradients) if part is not None]


def norm_distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("library")
@every_kind
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 7, 16), (2, 33, 70), (5, 4, 100), (1, 4096, 17)])
def test_kernel_equals_the_scan_in_torch(kind: str, rows: bool, shape: tuple[int, int, int]) -> None:
    case = Case(kind, *shape, rows=rows)
    expected = case.expected()
    for found, wanted in zip(case.results(), expected, strict=True):
        assert norm_distance(found, wanted) < 5e-6
    for found, wanted in zip(case.results(bf16=True), expected, strict=True):
        assert norm_distance(found, wanted) < 0.02


@pytest.mark.usefixtures("library")
@every_kind
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("often", [0.3, 1.0])
def test_resets_put_the_start_in_the_state_s_place(kind: str, rows: bool, often: float) -> None:
    case = Case(kind, 3, 9, 20, rows=rows, resets=often)
    assert case.where_BT.any()
    for bf16, limit in ((False, 5e-6), (True, 0.02)):
        for found, expected in zip(case.results(bf16=bf16), case.expected(), strict=True):
            assert (found - expected).norm() <= limit * expected.norm()


@pytest.mark.usefixtures("library")
@every_kind
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "rows"])
def test_kernel_gives_the_same_bits_on_any_number_of_threads(kind: str, rows: bool) -> None:
    case = Case(kind, 3, 20, 70, rows=rows)
    torch.set_num_threads(1)
    expected = case.results()
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        # The products beside it are torch's, which may add in another order.
        torch.testing.assert_close(case.results()[:2], expected[:2], rtol=1e-6, atol=1e-6)
    gates, bias = torch.randn(3, 20, GATES[kind] * 70), torch.randn(GATES[kind] * 70)
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        leaves = [tensor.clone().requires_grad_() for tensor in (gates, bias, case.h_BH.detach())]
        out_BTH, last_BH = scan._ScannedWindow.apply(kind, leaves[0].clone(), None, *leaves[1:])  # type: ignore[no-untyped-call]
        loss = (out_BTH * case.d_outputs).sum() + (last_BH * case.d_last).sum()
        results.append([out_BTH, last_BH, *torch.autograd.grad(loss, leaves)])
    for result in results[1:]:
        assert all(torch.equal(found, wanted) for found, wanted in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("library")
@every_kind
def test_gates_at_their_ends_are_near_double_precision_in_the_kernel_and_nan_stays(kind: str) -> None:
    gates_BTG = extreme_gates(kind, same=False).requires_grad_()
    units = gates_BTG.shape[2] // GATES[kind]
    h_BH, bias_G = torch.randn(1, units), torch.zeros(gates_BTG.shape[2])
    found_BTH, _ = scan._ScannedWindow.apply(kind, gates_BTG.clone(), None, bias_G, h_BH)  # type: ignore[no-untyped-call]
    clamped_BTG = gates_BTG.double().clamp(-80, 80)  # beyond, two shut gates of the minLSTM are as good as equal
    expected_BTH = loop(*minimal_gates(kind, clamped_BTG), h_BH.double())
    torch.testing.assert_close(found_BTH.double(), expected_BTH, rtol=0, atol=1e-3)
    [found] = torch.autograd.grad(found_BTH.mean(), gates_BTG)
    assert found.isfinite().all()
    with torch.no_grad():
        gates_BTG[0, 5, 0] = torch.nan
    spoilt_BTH, _ = scan._ScannedWindow.apply(kind, gates_BTG, None, bias_G, h_BH)  # type: ignore[no-untyped-call]
    assert spoilt_BTH[0, 5:, 0].isnan().all()
    assert spoilt_BTH.isnan().sum() == 4091


@pytest.mark.usefixtures("library")
def test_a_second_backward_is_refused_for_the_first_has_overwritten_what_it_needs() -> None:
    layer = random_layer("mingru", I, 4).float()
    out_BTH, _ = layer(torch.randn(2, 3, I), (torch.zeros(2, 4),))
    out_BTH.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        out_BTH.sum().backward()


@pytest.mark.usefixtures("library")
def test_a_row_that_is_not_there_is_refused() -> None:
    case = Case("mingru", 2, 3, 4, rows=True)
    assert case.index is not None
    case.index[0, 0], case.index[1, 2] = 0, V
    with pytest.raises(IndexError, match="0 to 7 of 7 rows"):
        case.results()


@every_kind
def test_without_a_compiler_a_layer_computes_the_same_in_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_kernels", lambda: None)
    layer = random_layer(kind, I, 6).float()
    assert not is_scanned(kind, layer.weights.weight_ih_l0)
    rows_VI, index_BT, state = torch.randn(V, I), torch.randint(V, (2, 9)), (torch.randn(2, 6),)
    out_BTH, (last_BH,) = layer(Rows(rows_VI, index_BT), state)
    expected_BTH, (expected_BH,) = unroll(CELLS[kind], rows_VI[index_BT], state, weights_of(layer))
    torch.testing.assert_close(out_BTH, expected_BTH)
    torch.testing.assert_close(last_BH, expected_BH)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_BTH, _ = layer(Rows(rows_VI, index_BT), state)
    torch.testing.assert_close(rounded_BTH.float(), expected_BTH, rtol=0.05, atol=0.05)


@every_kind
def test_double_precision_is_left_to_torch(kind: str) -> None:
    assert not is_scanned(kind, torch.empty(1, dtype=torch.float64))
