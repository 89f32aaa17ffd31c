"""The updates: Muon for matrices, Adam for the rest, a bias nudge to balance the experts."""

from __future__ import annotations

from typing import Any

import torch
from parallel import Workers
from torch import Tensor, nn
from transformers import GlmMoeDsaForCausalLM


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise wide matrices ``[K, m, n]``, m <= n, by Muon's Newton-Schulz iteration."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Muon:
    """Momentum orthogonalised by Newton-Schulz, batched over matrices of equal shape.

    Stacked expert weights count as one matrix per expert, and the joined gate and up
    projections as two.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], momentum: float, decay: float) -> None:
        self.momentum = momentum
        self.decay = decay
        self.buffers = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.parameters = parameters
        self.buckets: dict[tuple[int, int], list[str]] = {}
        for name, parameter in parameters.items():
            rows, columns = self._matrices(name, parameter).shape[1:]
            self.buckets.setdefault((min(rows, columns), max(rows, columns)), []).append(name)

    @staticmethod
    def _matrices(name: str, tensor: Tensor) -> Tensor:
        if "gate_up_proj" in name:
            return tensor.reshape(-1, tensor.shape[1] // 2, tensor.shape[2])
        return tensor.reshape(-1, *tensor.shape[-2:])

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Make one update with learning rate ``rate``."""
        for names in self.buckets.values():
            updates = []
            for name in names:
                gradient = self.parameters[name].grad
                buffer = self.buffers[name]
                buffer.lerp_(gradient, 1 - self.momentum)
                update = self._matrices(name, gradient.lerp(buffer, self.momentum))
                tall = update.shape[1] > update.shape[2]
                updates.append(update.transpose(1, 2) if tall else update)
            joined = orthogonalise(torch.cat(updates))
            start = 0
            for name, update in zip(names, updates, strict=True):
                part = joined[start : start + len(update)]
                start += len(update)
                parameter = self.parameters[name]
                target = self._matrices(name, parameter)
                if part.shape != target.shape:
                    part = part.transpose(1, 2)
                scale = max(1.0, target.shape[1] / target.shape[2]) ** 0.5
                parameter.mul_(1 - rate * self.decay)
                parameter.sub_(part.reshape(parameter.shape), alpha=rate * scale)


def sort_parameters(model: GlmMoeDsaForCausalLM) -> dict[str, dict[str, nn.Parameter]]:
    """The model's parameters, sorted by the kind of update that they get and then by name."""
    kinds = {kind: {} for kind in ("indexer", "embedding", "head", "other", "matrix")}
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            kind = "indexer"
        elif "embed_tokens" in name:
            kind = "embedding"
        elif "lm_head" in name:
            kind = "head"
        elif parameter.ndim < 2 or name.endswith("mlp.gate.weight"):
            kind = "other"
        else:
            kind = "matrix"
        kinds[kind][name] = parameter
    return kinds


class Optimizer:
    """Muon for the matrices inside the layers, Adam for everything else."""

    def __init__(
        self, model: GlmMoeDsaForCausalLM, matrix_rate: float, adam_rate: float, workers: Workers
    ) -> None:
        self.workers = workers
        self.matrix_rate = matrix_rate
        kinds = sort_parameters(model)
        matrices = kinds["matrix"]
        embeddings, heads, others, self.indexer_parameters = (
            list(kinds[kind].values()) for kind in ("embedding", "head", "other", "indexer")
        )
        names = sorted(matrices, key=lambda name: (tuple(matrices[name].shape), name))
        self.muons = [
            Muon({name: matrices[name] for name in names[i :: workers.count]}, 0.95, 0.1)
            for i in range(workers.count)
        ]
        self.adam = torch.optim.AdamW(
            [
                {"params": embeddings, "base": 4 * adam_rate, "weight_decay": 0.0},
                {"params": heads, "base": adam_rate, "weight_decay": 0.01},
                {"params": others, "base": adam_rate, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            eps=1e-10,
            fused=True,
        )
        self.indexer_adam = torch.optim.AdamW(
            self.indexer_parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.adam_parameters = [*embeddings, *heads, *others]
        self.model_parameters = [*matrices.values(), *self.adam_parameters]

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "muon": [muon.buffers for muon in self.muons],
            "adam": self.adam.state_dict(),
            "indexer_adam": self.indexer_adam.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        for muon, buffers in zip(self.muons, state["muon"], strict=True):
            for name, buffer in buffers.items():
                muon.buffers[name].copy_(buffer)
        self.adam.load_state_dict(state["adam"])
        self.indexer_adam.load_state_dict(state["indexer_adam"])

    def step(self, factor: float) -> None:
        """Update the model (not the indexers) at ``factor`` times the peak rates."""
        torch.nn.utils.clip_grad_norm_(self.adam_parameters, 1.0)
        self.workers.map(lambda i: self.muons[i].step(self.matrix_rate * factor))
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * factor
        self.adam.step()

    def step_indexers(self, rate: float) -> None:
        """Update the indexers."""
        torch.nn.utils.clip_grad_norm_(self.indexer_parameters, 1.0)
        for group in self.indexer_adam.param_groups:
            group["lr"] = rate
        self.indexer_adam.step()

    def zero(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.model_parameters, *self.indexer_parameters):
            parameter.grad = None


def load_spread(loads: Tensor) -> float:
    """The busiest expert's load over the mean, averaged over the layers that have experts."""
    share = loads.sum(0)[1:].float()
    return (share.max(1).values / share.mean(1)).mean().item()


def balance(model: GlmMoeDsaForCausalLM, loads: Tensor, rate: float) -> None:
    """Nudge every expert's bias against its load error, which is auxiliary-loss-free balancing."""
    for layer, load in zip(model.model.layers, loads.sum(0), strict=True):
        if hasattr(layer.mlp, "gate"):
            error = load.float().mean() - load.float()
            layer.mlp.gate.e_score_correction_bias.add_(error.sign(), alpha=rate)
    loads.zero_()
