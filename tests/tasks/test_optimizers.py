from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elman.config.schema import RECURRENT_CELLS, ModelConfig, OptimizerConfig
from elman.models.language_model import build_model
from elman.tasks import optimizers
from elman.tasks.language_modeling import LanguageModeling
from elman.tasks.optimizers import NTASGD, build_optimizer, clip_gradients, parameter_groups


def model(**settings: Any) -> nn.Module:
    config = ModelConfig(embedding_size=4, hidden_size=4, layer_norm=True, initial_state="learned", **settings)
    return build_model(config, vocabulary_size=5, num_inputs=6, start_id=5, context_length=8)


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_spares_biases_norms_embeddings_and_initial_states(cell: Any, tied: bool) -> None:
    network = model(cell=cell, tie_weights=tied)
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, spared = [[names[id(p)] for p in group["params"]] for group in parameter_groups(network, 0.1)]
    assert len(decayed) + len(spared) == len(names)
    assert any("weight_ih" in name for name in decayed)
    assert not [n for n in decayed if "bias" in n or "norm" in n or "embedding" in n or "initial" in n]
    assert not [n for n in spared if "weight_hh" in n or "weight_ih" in n]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "nt_asgd"])
def test_every_optimizer_learns(name: Any) -> None:
    torch.manual_seed(0)
    network = model(cell="gru")
    momentum = 0.5 if name in ("sgd", "rmsprop", "nt_asgd") else 0.0
    optimizer = build_optimizer(network, OptimizerConfig(name=name, lr=0.02, momentum=momentum, weight_decay=1e-4))
    tokens = torch.randint(5, (4, 12))
    losses = []
    for _ in range(30):
        logits, _ = network(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def asgd() -> tuple[NTASGD, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(2))
    return NTASGD([weight], lr=1.0, interval=2), weight


def step(optimizer: NTASGD, weight: nn.Parameter, gradient: float) -> None:
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()


def test_averaging_starts_when_the_loss_beats_none_of_the_best_before_the_interval() -> None:
    optimizer, _ = asgd()
    states = []
    for loss in (5.0, 4.0, 4.5, 4.6, 3.0, 4.2, 4.1):
        optimizer.validated(loss)
        states.append(optimizer.averaged_steps is not None)
    # 4.6 beats 5.0, and 3.0 beats 4.0, the best before the last two; 4.2 does not beat 4.0.
    assert states == [False] * 5 + [True] * 2


def test_the_average_is_the_mean_of_the_weights_since_the_trigger() -> None:
    optimizer, weight = asgd()
    step(optimizer, weight, 7.0)
    optimizer.averaged_steps = 0
    seen = []
    for gradient in (1.0, 2.0, 4.0):
        step(optimizer, weight, gradient)
        seen.append(weight.detach().clone())
    assert optimizer.swap()
    assert torch.allclose(weight, torch.stack(seen).mean(0))
    assert optimizer.swap()
    assert torch.equal(weight, seen[-1])


def test_nothing_is_swapped_before_the_trigger() -> None:
    optimizer, weight = asgd()
    step(optimizer, weight, 1.0)
    assert not optimizer.swap()


def test_the_trigger_and_the_average_survive_a_checkpoint() -> None:
    first, weight = asgd()
    for loss in (1.0, 2.0, 3.0, 4.0):
        first.validated(loss)
    step(first, weight, 1.0)
    second, other = asgd()
    with torch.no_grad():
        other.copy_(weight)
    second.load_state_dict(deepcopy(first.state_dict()))
    for optimizer, p in ((first, weight), (second, other)):
        step(optimizer, p, 3.0)
        optimizer.swap()
    assert torch.equal(weight, other)
    assert second.averaged_steps == first.averaged_steps == 2


def test_sgd_moves_only_the_rows_of_a_large_embedding_that_occurred_and_as_the_dense_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(large: int) -> tuple[list[Tensor], list[float], bool]:
        monkeypatch.setattr(optimizers, "LARGE_VOCABULARY", large)
        torch.manual_seed(0)
        network = model().double()
        optimizer = build_optimizer(network, OptimizerConfig(name="sgd", lr=0.01, weight_decay=0.1))
        tokens_BT = torch.tensor([[3, 1, 3, 3]])
        norms, is_sparse = [], False
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):  # as accumulated windows are
                network(tokens_BT)[0].pow(2).sum().backward()
            is_sparse = network.embedding.weight.grad.is_sparse
            norms.append(clip_gradients(network.parameters(), 0.2).item())
            optimizer.step()
        return [p.detach() for p in network.parameters()], norms, is_sparse

    dense, sparse = trained(10**6), trained(2)
    assert (dense[2], sparse[2]) == (False, True)
    torch.testing.assert_close(sparse[:2], dense[:2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("ceiling", [0.25, 1e6, None])
@pytest.mark.parametrize("spoiled", [False, True])
def test_gradients_are_clipped_as_torch_clips_them_to_the_bit(ceiling: float | None, spoiled: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.zeros(5, 3, requires_grad=True), torch.zeros(7, requires_grad=True)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine)
        if spoiled:
            mine.grad[0] = torch.nan
        other.grad = mine.grad.clone()
    unused = torch.zeros(2, requires_grad=True)
    norm = clip_gradients([*ours, unused], ceiling)
    expected = torch.nn.utils.clip_grad_norm_([*theirs, unused], ceiling or torch.inf)
    for found, wanted in [(norm, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert clip_gradients([unused], ceiling) == 0


@pytest.mark.parametrize(
    ("name", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("nt_asgd", 0.0), ("nt_asgd", 0.9), ("adam", 0.0)]
)
def test_an_update_with_clipped_gradients_is_torchs_own_also_where_the_rate_is_lowered_instead(
    name: Any, momentum: float
) -> None:
    torch.manual_seed(0)
    ours, theirs = model().double(), model().double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, OptimizerConfig(name=name, lr=0.1, momentum=momentum, weight_decay=0.1))
    groups = parameter_groups(theirs, 0.1)
    reference = torch.optim.Adam(groups, 0.1) if name == "adam" else torch.optim.SGD(groups, 0.1, momentum)
    touched = []
    for ceiling in (1e-3, 1e9, 0.1):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        clip_gradients(ours.parameters(), ceiling, optimizer)
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        touched.append(any(not torch.equal(mine.grad, other.grad) for mine, other in pairs))
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), ceiling)
        optimizer.step()
        reference.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)
        assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.1, 0.1), (0.1, 0.0)}
    lowered = name != "adam" and not momentum
    assert touched == [not lowered, False, not lowered]


def test_an_infinite_gradient_does_not_stop_sgd() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(nn.ParameterList([weight]), OptimizerConfig(name="sgd", weight_decay=0.1))
    weight.grad = torch.tensor([torch.inf, 1.0])
    assert clip_gradients([weight], 1.0, optimizer) == torch.inf
    optimizer.step()
    assert torch.isnan(weight[0])


RULES = [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}, {"name": "nt_asgd"}]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_rules_with_a_memory_keep_the_dense_gradient(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "LARGE_VOCABULARY", 2)
    network = model()
    build_optimizer(network, OptimizerConfig(**settings))
    assert not network.embedding.sparse


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_embedding_has_a_learning_rate_of_its_own(is_sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "LARGE_VOCABULARY", 2 if is_sparse else 10**6)

    def moved(factor: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = OptimizerConfig(name="sgd", lr=0.01, embedding_lr_factor=factor, max_grad_norm=None)
        network = model()
        task = LanguageModeling(network, config, bits=None, sequence_length=4)  # type: ignore[arg-type]
        optimizer = task.configure_optimizers()
        task._trainer = SimpleNamespace(global_step=0, current_epoch=0, optimizers=[optimizer])  # type: ignore[assignment]
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        network(torch.tensor([[3, 1, 3, 2]]))[0].pow(2).sum().backward()
        task.on_train_batch_start(None, 0)
        assert task.lr == 0.01
        optimizer.step()
        return {name: p.detach() - before[name] for name, p in network.named_parameters()}

    once, thrice = moved(1.0), moved(3.0)
    for name, change in once.items():
        expected = 3 * change if name == "embedding.weight" else change
        torch.testing.assert_close(thrice[name], expected, rtol=1e-3, atol=1e-7)
    assert once["embedding.weight"].abs().max() > 1e-4
