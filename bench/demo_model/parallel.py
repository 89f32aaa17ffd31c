"""One thread and one replica of the model per share of a batch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from forward import Forward, forward
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM


def keep_memory() -> None:
    """Have glibc reuse large blocks instead of returning them to the kernel every time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
            mallopt(option, value)  # sets one arena, no mmap, no trimming, growth in large steps


class Workers:
    """Threads that each run PyTorch single-threaded on their own share of a batch.

    Parallel operators would wait for their slowest thread in every small operation, which hurts
    on a machine shared with other jobs; these wait for each other only once per pass.
    """

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.count = count
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[int], object]) -> list:
        """Call ``function(i)`` for every worker ``i``, in parallel; return the results."""
        return [f.result() for f in [self.pool.submit(function, i) for i in range(self.count)]]


class Replicas:
    """A model once per worker, with shared weights and gradients of its own; the first is itself.

    ``loads[worker, layer, expert]`` counts the tokens that each expert got.
    """

    def __init__(self, model: GlmMoeDsaForCausalLM, workers: Workers) -> None:
        self.workers = workers
        self.models = [model, *(share_weights(model) for _ in range(workers.count - 1))]
        config = model.config
        shape = workers.count, config.num_hidden_layers, config.n_routed_experts
        self.loads = torch.zeros(shape, dtype=torch.long)

    def freeze(self, frozen: bool) -> None:
        """Freeze or release everything but the indexers."""
        for model in self.models:
            for name, parameter in model.named_parameters():
                if ".indexer." not in name:
                    parameter.requires_grad_(not frozen)

    def backward(self, tokens: Tensor, *, sparse: bool, language: bool, indexer: bool) -> Tensor:
        """Run forward and backward over a batch; returns mean losses ``[language, *indexers]``."""

        def work(worker: int) -> Tensor:
            part = tokens[worker :: self.workers.count]
            options = Forward(sparse=sparse, indexer_loss=indexer, loads=self.loads[worker])
            logits = forward(self.models[worker], part[:, :-1], options)
            losses = list(options.losses)
            if language:
                losses.insert(0, F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
            share = torch.stack(losses) * (len(part) / len(tokens))
            share.sum().backward()
            return share.detach()

        results = torch.stack(self.workers.map(work)).sum(0)
        self._gather_gradients()
        return results

    @torch.no_grad()
    def _gather_gradients(self) -> None:
        """Add the replicas' gradients to the first model's and drop them."""
        parameters = list(zip(*(model.parameters() for model in self.models), strict=True))

        def gather(worker: int) -> None:
            for mine, *others in parameters[worker :: self.workers.count]:
                for other in others:
                    if other.grad is not None:
                        mine.grad = other.grad if mine.grad is None else mine.grad.add_(other.grad)
                        other.grad = None

        self.workers.map(gather)


def share_weights(model: GlmMoeDsaForCausalLM) -> GlmMoeDsaForCausalLM:
    """A second model on the same weights and buffers."""
    replica = GlmMoeDsaForCausalLM(model.config)
    for kind in ("parameters", "buffers"):
        pairs = zip(getattr(replica, kind)(), getattr(model, kind)(), strict=True)
        for mine, theirs in pairs:
            mine.data = theirs.data
    return replica
