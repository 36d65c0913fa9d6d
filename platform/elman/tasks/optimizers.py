"""Update rules, and which parameters weight decay spares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elman.config.schema import OptimizerConfig
from elman.models.language_model import LanguageModel
from elman.models.softmax import LARGE_VOCABULARY


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, apart from biases, norms, embeddings and initial states, which do not.

    Pulling those towards zero removes no capacity that overfits; it shifts what the
    network computes at rest. An embedding that serves as output layer too is spared.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def decays(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and id(p) not in embeddings and "initial" not in name

    decayed = [p for name, p in parameters if decays(name, p)]
    spared = [p for name, p in parameters if not decays(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class SGD(torch.optim.SGD):
    """torch's, whose next step may take the gradients times a factor, in one pass with the update."""

    _factor = 1.0

    def scale(self, factor: float) -> bool:
        """Multiply the gradients of the next step; False where that is not the same as a lower rate."""
        scales = factor > 0 and not any(group["momentum"] for group in self.param_groups)
        if scales:
            self._factor = factor
        return scales

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        factor, self._factor = self._factor, 1.0
        if factor == 1:
            return super().step(closure)
        settings = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group, (lr, decay) in zip(self.param_groups, settings, strict=True):
            group["lr"], group["weight_decay"] = lr * factor, decay / factor
        try:
            return super().step(closure)
        finally:
            for group, (lr, decay) in zip(self.param_groups, settings, strict=True):
                group["lr"], group["weight_decay"] = lr, decay


def clip_gradients(
    parameters: Iterable[Tensor], ceiling: float | None, optimizer: torch.optim.Optimizer | None = None
) -> Tensor:
    """Scale the gradients down to a global L2 norm of ``ceiling``; returns the norm before.

    As torch's clip_grad_norm_, which cannot take sparse gradients with its fast loops. An optimizer that
    can scale them in its next step does it instead.
    """
    limit = float("inf") if ceiling is None else ceiling
    grads = []
    for p in parameters:
        if p.grad is not None:
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()  # a row that occurs twice counts by its sum
            grads.append(p.grad._values() if p.grad.is_sparse else p.grad)
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    # Times one is nothing, but reads and writes them all; where asking would wait for a GPU, it is not asked.
    on_cpu = factor.device.type == "cpu"
    if on_cpu and (factor == 1 or (isinstance(optimizer, SGD) and optimizer.scale(factor.item()))):
        return norm
    torch._foreach_mul_(grads, factor)
    return norm


def _use_sparse_gradients(model: LanguageModel, config: OptimizerConfig) -> bool:
    """Tell the embedding whether its gradient is to hold only the rows of the window's tokens.

    Of tens of thousands of rows a window has hundreds, and plain SGD leaves the others where they
    are. Whatever keeps a memory for each weight moves them all.
    """
    forgets = config.name == "sgd" and not config.momentum
    sparse = forgets and not model.config.tie_weights and model.num_inputs >= LARGE_VOCABULARY
    model.embedding.sparse = sparse
    return sparse


def _with_own_group(groups: list[dict[str, Any]], own: Tensor, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups, with one parameter in a group of its own that has some options besides."""
    [home] = [group for group in groups if any(p is own for p in group["params"])]
    groups = [group | {"params": [p for p in group["params"] if p is not own]} for group in groups]
    return [*(group for group in groups if group["params"]), home | {"params": [own]} | options]


class NTASGD(SGD):
    """Averaged SGD, triggered by a validation loss that stops improving.

    From the trigger on, a running mean of the weights is kept beside them; the mean is
    what is validated, saved as best and used. Source: Polyak & Juditsky (1992),
    doi:10.1137/0330046; the trigger: Merity et al. (2018), arXiv:1708.02182, algorithm 1.

    Args:
        params: As of torch.optim.SGD.
        interval: n of the paper: validations to look back.
        kwargs: As of torch.optim.SGD.
    """

    def __init__(self, params: Any, *, interval: int, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.interval = interval
        self._losses: list[float] = []
        self.averaged_steps: int | None = None

    def validated(self, loss: float) -> None:
        """Tell the trigger the newest validation loss."""
        if self.averaged_steps is None:
            earlier = self._losses[: -self.interval] if len(self._losses) > self.interval else []
            if earlier and loss > min(earlier):
                self.averaged_steps = 0
        self._losses.append(loss)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One SGD step, and one step of the mean where it runs."""
        loss = super().step(closure)
        if self.averaged_steps is not None:
            self.averaged_steps += 1
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "average" not in state:
                        state["average"] = p.detach().clone()
                    state["average"].lerp_(p.detach(), 1 / self.averaged_steps)
        return loss

    @torch.no_grad()
    def swap(self) -> bool:
        """Exchange the weights with their means; a second call exchanges them back. False where no mean runs."""
        if not self.averaged_steps:
            return False
        for group in self.param_groups:
            for p in group["params"]:
                held = p.detach().clone()
                p.copy_(self.state[p]["average"])
                self.state[p]["average"].copy_(held)
        return True

    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim.SGD, with the trigger."""
        return {**super().state_dict(), "trigger": {"losses": list(self._losses), "steps": self.averaged_steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of torch.optim.SGD, with the trigger."""
        state = dict(state_dict)
        trigger = state.pop("trigger")
        super().load_state_dict(state)
        self._losses, self.averaged_steps = list(trigger["losses"]), trigger["steps"]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The update rule that the configuration names, over the model's parameters.

    Sources: momentum, Sutskever et al. (2013); Adam, Kingma & Ba (2015), arXiv:1412.6980;
    AdamW, Loshchilov & Hutter (2019), arXiv:1711.05101; RMSprop, Tieleman & Hinton (2012).
    A larger rate for the embedding: Yang et al. (2022), arXiv:2203.03466. Adam moves every weight by
    about the rate, and a sum of many inputs by many times that, but a row that is looked up only by
    the rate itself.
    """
    groups = parameter_groups(model, config.weight_decay)
    # One kernel for all parameters instead of a loop over them.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    if isinstance(model, LanguageModel):
        apart: dict[str, Any] = {}
        if config.embedding_lr_factor != 1:
            apart["lr_factor"] = config.embedding_lr_factor
        if _use_sparse_gradients(model, config):
            apart["fused"] = False  # torch's fused kernels do not take them
        if apart:
            groups = _with_own_group(groups, model.embedding.weight, apart)
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if config.name == "nt_asgd":
        return NTASGD(groups, lr=config.lr, momentum=config.momentum, interval=config.nonmonotone_interval)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, fused=fused)
