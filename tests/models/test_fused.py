"""The compiled kernel computes what cells.py writes out, as near as bfloat16 comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from elman.config.schema import ModelConfig
from elman.models import fused
from elman.models.cells import CELLS, CellWeights, unroll
from elman.models.fused import LAYOUTS, Resets, Rows, fused_window
from elman.models.language_model import LanguageModel
from elman.models.recurrent import RecurrentLayer
from elman.models.state import pieces, replace_rows
from kernel_support import PRODUCTS, use_product

SHAPES = [(1, 1, 5), (3, 2, 33), (64, 17, 512), (100, 3, 70), (5, 4, 16), (20, 3, 400)]
I, V = 12, 7  # noqa: E741
every_kind = pytest.mark.parametrize("kind", LAYOUTS)


@pytest.fixture(params=PRODUCTS, autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel with each kind of product that it has."""
    use_product(monkeypatch, fused, request.param)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Case:
    """Random weights, states and inputs of one layer."""

    def __init__(
        self, kind: str, batch_size: int, length: int, hidden_size: int, *, rows: int = 0, resets: float = 0
    ) -> None:
        torch.manual_seed(0)
        self.kind = kind
        size = LAYOUTS[kind].gates * hidden_size

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape)).requires_grad_()

        self.weights = [leaf(size, I, scale=I**-0.5), leaf(size, hidden_size, scale=0.7 * hidden_size**-0.5)]
        self.weights += [leaf(size, scale=0.1), leaf(size, scale=0.1)]
        if kind == "rnn_relu":  # its slope jumps at 0, where rounding decides: units stay on either side
            with torch.no_grad():
                self.weights[1] *= 0.25
                self.weights[2] += 4 * torch.randn(size).sign()
        num_states = 2 if kind == "lstm" else 1
        self.state = tuple(leaf(batch_size, hidden_size, scale=0.5) for _ in range(num_states))
        self.given = leaf(rows, I) if rows else leaf(batch_size, length, I)
        self.index = torch.randint(rows, (batch_size, length)) if rows else None
        self.start = tuple(leaf(1, hidden_size, scale=0.5) for _ in range(num_states)) if resets else ()
        self.where = torch.rand(batch_size, length) < resets
        self.d_outputs = torch.randn(batch_size, length, hidden_size)
        self.d_state = [torch.randn(batch_size, hidden_size) for _ in self.state]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.given, *self.weights, *self.state, *self.start]

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.given if self.index is None else Rows(self.given, self.index)
            resets = Resets(self.where, self.start) if self.start else None
            return fused_window(self.kind, x, self.state, self.weights, resets)

    def loss(self, outputs: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        sums = [(part * factor).sum() for part, factor in zip(state, self.d_state, strict=True)]
        return (outputs.to(state[0].dtype) * self.d_outputs).sum() + sum(sums)

    def found(self) -> list[Tensor]:
        """Outputs, last state, and every gradient."""
        outputs, state = self.run()
        return [outputs, *state, *torch.autograd.grad(self.loss(outputs, state), self.leaves)]

    def expected(self) -> list[Tensor]:
        """The same in double precision."""
        given, *rest = (leaf.detach().double().requires_grad_() for leaf in self.leaves)
        x = given if self.index is None else given[self.index]
        weights, state = CellWeights(*rest[:4]), tuple(rest[4 : 4 + len(self.state)])
        outputs = []
        for step in range(x.shape[1]):
            if self.start:
                (state,) = replace_rows((state,), (tuple(rest[4 + len(self.state) :]),), self.where[:, step])
            out_BTH, state = unroll(CELLS[self.kind], x[:, step : step + 1], state, weights)
            outputs.append(out_BTH)
        outputs = torch.cat(outputs, dim=1)
        return [outputs, *state, *torch.autograd.grad(self.loss(outputs, state), [given, *rest])]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).double().norm() / expected.detach().double().norm())


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [0, V, 2 * I], ids=["dense", "few rows", "many rows"])
def test_window_equals_written_out_cell_forward_and_in_every_gradient(
    kind: str, shape: tuple[int, int, int], rows: int
) -> None:
    case = Case(kind, *shape, rows=rows)
    distances = [distance(*pair) for pair in zip(case.found(), case.expected(), strict=True)]
    assert max(distances) < 0.015, distances  # bfloat16 has steps of 0.4 to 0.8 percent


@every_kind
@pytest.mark.parametrize("shape", [(2, 6, 5), (64, 9, 272), (100, 5, 70)], ids=str)
@pytest.mark.parametrize(("rows", "often"), [(0, 0.3), (V, 0.3), (V, 1.0)], ids=str)
def test_resets_put_the_start_in_the_state_s_place_forward_and_in_every_gradient(
    kind: str, shape: tuple[int, int, int], rows: int, often: float
) -> None:
    case = Case(kind, *shape, rows=rows, resets=often)
    assert case.where.any()
    for found, expected in zip(case.found(), case.expected(), strict=True):
        if expected.any():
            assert distance(found, expected) < 0.015
        else:  # of what no step sees, as the state before where every row is reset at once
            assert not found.any()


@every_kind
def test_a_window_with_resets_equals_its_pieces_to_the_bit(kind: str) -> None:
    case = Case(kind, 3, 9, 20, rows=V, resets=0.2)
    assert 0 < case.where.any(0).sum() < 9
    whole, last = case.run()
    outputs, state = [], case.state
    for begin, end, rows in pieces(case.where):
        if rows is not None:
            (state,) = replace_rows((state,), (case.start,), rows)
        with torch.autocast("cpu", torch.bfloat16):
            out, state = fused_window(kind, Rows(case.given, case.index).steps(begin, end), state, case.weights)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, dim=1), whole)
    assert all(torch.equal(one, two) for one, two in zip(state, last, strict=True))
    with torch.inference_mode():
        found, found_state = case.run()
    assert torch.equal(found, whole)
    assert all(torch.equal(one, two) for one, two in zip(found_state, last, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "rnn_relu"])
def test_gates_are_good_to_a_millionth_where_no_product_is_rounded(kind: str) -> None:
    case = Case(kind, 1, 1, 2048)
    weight_ih, weight_hh, bias_ih, bias_hh = (weight.detach() for weight in case.weights)
    weight_ih, weight_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
    bias_ih = torch.linspace(-20, 20, bias_ih.numel())[torch.randperm(bias_ih.numel())]
    bias_ih[::7] *= 1e-4
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    x_BTI, state = torch.zeros(1, 1, I), tuple(part.detach() for part in case.state)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = fused_window(kind, x_BTI, state, weights)
    exact = CellWeights(*(weight.double() for weight in (weight_ih, weight_hh, bias_ih, bias_hh)))
    expected = CELLS[kind](x_BTI[:, 0].double(), tuple(part.double() for part in state), exact)
    for part, exact_part in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), exact_part, rtol=2e-6, atol=2e-7)


@every_kind
def test_results_are_the_same_bits_with_any_number_of_threads_and_every_time(kind: str) -> None:
    for hidden_size, resets in ((33, 0), (200, 0), (33, 0.3)):
        case = Case(kind, 5, 6, hidden_size, resets=resets)
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.found())
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@every_kind
def test_a_table_s_gradient_is_the_same_bits_with_any_number_of_threads(kind: str) -> None:
    torch.manual_seed(0)
    layout, size = LAYOUTS[kind], 48
    table_VG = torch.randn(V, layout.gates * size, requires_grad=True)
    weight_hh = torch.randn(layout.gates * size, size) / 7
    bias_C = torch.randn(layout.columns * size)
    state = [torch.randn(4, size) for _ in range(2 if kind == "lstm" else 1)]
    tokens_TB = torch.randint(V, (9, 4))
    gradients = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, *_ = fused._FusedWindow.apply(kind, table_VG, tokens_TB, weight_hh, bias_C, None, *state)
        gradients += torch.autograd.grad(outputs.float().pow(2).sum(), table_VG)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@every_kind
def test_two_carried_windows_equal_one_long_window_to_the_bit(kind: str) -> None:
    case = Case(kind, 3, 9, 20)
    whole, last = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        first, state = fused_window(kind, case.given[:, :4], case.state, case.weights)
        second, carried = fused_window(kind, case.given[:, 4:], state, case.weights)
    assert torch.equal(torch.cat((first, second), dim=1), whole)
    assert all(torch.equal(one, two) for one, two in zip(carried, last, strict=True))
    cut = torch.autograd.grad(case.loss(torch.cat((first, second), dim=1), carried), case.leaves)
    for found, expected in zip(cut, torch.autograd.grad(case.loss(whole, last), case.leaves), strict=True):
        assert distance(found, expected) < 0.01


@every_kind
def test_evaluation_gives_the_outputs_of_training(kind: str) -> None:
    case = Case(kind, 3, 5, 40, rows=V)
    outputs, state = case.run()
    with torch.inference_mode():
        found, found_state = case.run()
    assert not found.requires_grad
    assert torch.equal(found, outputs)
    assert all(torch.equal(one, two) for one, two in zip(found_state, state, strict=True))


@every_kind
def test_gradients_do_not_depend_on_which_others_are_wanted(kind: str) -> None:
    case = Case(kind, 4, 5, 24, resets=0.3)
    wanted = case.found()[1 + len(case.state) :]
    for index, leaf in enumerate(case.leaves):
        for other in case.leaves:
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(case.loss(*case.run()), leaf)
        assert torch.equal(alone, wanted[index])


@every_kind
def test_a_loss_on_the_last_state_alone_goes_back_through_the_window(kind: str) -> None:
    case = Case(kind, 4, 5, 24)
    case.d_outputs.zero_()
    outputs, state = case.run()
    alone = torch.autograd.grad(case.loss(torch.zeros_like(outputs), state), case.leaves)
    both = torch.autograd.grad(case.loss(*case.run()), case.leaves)
    assert all(torch.equal(one, two) for one, two in zip(alone, both, strict=True))


@every_kind
def test_windows_that_wait_for_their_backward_do_not_share_memory(kind: str) -> None:
    cases = [Case(kind, 64, 40, 512) for _ in range(2)]
    with torch.no_grad():
        cases[1].given.mul_(-1)
    alone = [case.found() for case in cases]
    pending = [case.run() for case in cases]
    for case, (outputs, state), expected in zip(cases, pending, alone, strict=True):
        together = [outputs, *state, *torch.autograd.grad(case.loss(outputs, state), case.leaves)]
        assert all(torch.equal(one, two) for one, two in zip(together, expected, strict=True))


@pytest.mark.parametrize("wrong", [-1, V])
def test_an_index_without_a_row_is_refused(wrong: int) -> None:
    case = Case("gru", 2, 3, 16, rows=V)
    case.index[1, 2] = wrong
    with pytest.raises(IndexError, match="out of range"):
        case.run()


def test_a_second_backward_through_one_window_is_refused() -> None:
    case = Case("lstm", 2, 3, 16)
    loss = case.loss(*case.run())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        loss.backward()


@every_kind
def test_nan_reaches_the_outputs_and_huge_inputs_do_not_make_it(kind: str) -> None:
    case = Case(kind, 2, 4, 16)
    with torch.no_grad():
        case.given[0, 2, 0] = float("nan")
        outputs, state = case.run()
    assert outputs[0, 2:].isnan().all()
    assert state[0][0].isnan().all()
    assert outputs[0, :2].isfinite().all()
    assert outputs[1].isfinite().all()
    with torch.no_grad():
        case.given.fill_(1e6)
    assert all(tensor.isfinite().all() for tensor in case.found())


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of the windows that go through the kernel from now on, and of its calls backward."""
    calls: list[str] = []
    run = fused._call

    def call(kind: str, *rest: object, is_forward: bool, **named: object) -> None:
        calls.append(f"{kind} {'forward' if is_forward else 'backward'}")
        run(kind, *rest, is_forward=is_forward, **named)

    monkeypatch.setattr(fused, "_call", call)
    return calls


@every_kind
def test_a_layer_takes_the_kernel_under_bf16_autocast_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    cell, _, nonlinearity = kind.partition("_") if kind.startswith("rnn") else (kind, "", "tanh")
    layer = RecurrentLayer(ModelConfig(cell=cell, nonlinearity=nonlinearity), I, 8)
    state = tuple(part.expand(2, 8) for part in layer.initial_state())
    expected, _ = layer(torch.randn(2, 3, I), state)
    assert calls == []
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = layer(torch.randn(2, 3, I), state)
        with torch.no_grad():
            layer(torch.randn(2, 1, I), state)  # generation has a kernel of its own
    outputs.sum().backward()
    assert calls == [f"{kind} forward", f"{kind} backward"]
    assert outputs.shape == expected.shape


@every_kind
def test_weight_dropout_reaches_the_raw_weight(kind: str) -> None:
    cell, _, nonlinearity = kind.partition("_") if kind.startswith("rnn") else (kind, "", "tanh")
    layer = RecurrentLayer(ModelConfig(cell=cell, nonlinearity=nonlinearity, weight_dropout=0.5), I, 16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = layer(torch.randn(4, 6, I), tuple(part.expand(4, 16) for part in layer.initial_state()))
    outputs.float().pow(2).sum().backward()
    share = (layer.weights.weight_hh_l0.grad == 0).float().mean().item()
    assert 0.3 < share < 0.7


@pytest.mark.parametrize(
    ("settings", "tabled"),
    [
        ({}, True),
        ({"tie_weights": True}, True),
        ({"residual": True}, True),
        ({"initial_state": "learned", "num_layers": 2}, True),
        ({"input_dropout": 0.0001}, False),
        ({"embedding_dropout": 0.0001}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_model_s_gradients_are_those_of_single_precision(
    cell: str, settings: dict[str, object], tabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(cell=cell, **{"embedding_size": 24, "hidden_size": 24} | settings)
    model = LanguageModel(config, vocabulary_size=V, num_inputs=V + 1, start_id=V, context_length=8).train()
    tokens_BT = torch.randint(V, (8, 12))
    given: list[type] = []

    def window(kind: str, x: Tensor | Rows, *rest: object) -> object:
        given.append(type(x))
        return fused_window(kind, x, *rest)

    monkeypatch.setattr("elman.models.recurrent.fused_window", window)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits_BTV, _ = model(tokens_BT)
        logits_BTV.float().pow(2).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert (given[0] is Rows) == tabled
    for name, gradient in expected.items():
        assert distance(found[name], gradient) < 0.05, name


def test_an_embedding_larger_than_the_window_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(cell="lstm", embedding_size=4, hidden_size=4)
    model = LanguageModel(config, vocabulary_size=50, num_inputs=51, start_id=50, context_length=8)
    assert isinstance(model._embed(torch.zeros(2, 5, dtype=torch.int64)), Tensor)
    assert isinstance(model._embed(torch.zeros(30, 5, dtype=torch.int64)), Rows)


@every_kind
def test_without_the_kernel_a_layer_computes_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, _, nonlinearity = kind.partition("_") if kind.startswith("rnn") else (kind, "", "tanh")
    layer = RecurrentLayer(ModelConfig(cell=cell, nonlinearity=nonlinearity), I, 24)
    x = Rows(torch.randn(V, I), torch.randint(V, (3, 5)))
    state = tuple(part.expand(3, 24) for part in layer.initial_state())

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, state)[0]

    outputs = run()
    none: Callable[[], None] = lambda: None  # noqa: E731
    monkeypatch.setattr(fused, "_kernels", none)
    assert distance(outputs, run()) < 0.02
