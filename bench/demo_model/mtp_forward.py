"""The MTP layer's forward pass, differentiable, for whole windows and for drafts that chain.

Row i takes the normed hidden state of position i and the embedding of token i + 1, and predicts
token i + 2. A chained draft takes the layer's own normed state of the row before in the place of
the model's; of the layer's cache it sees the rows made from the model's states up to where its
chain began, then those of its chain.

Weights are a dict by the names that they have in a checkpoint after ``model.layers.N.``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from forward import mix_experts, rotate, swiglu
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes that the weights do not tell."""

    heads: int
    nope: int
    rope: int
    latent: int
    topk: int
    index_heads: int
    experts_per_token: int
    scaling: float
    eps: float
    theta: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Those of a checkpoint's config."""
        return cls(
            config["num_attention_heads"],
            config["qk_nope_head_dim"],
            config["qk_rope_head_dim"],
            config["kv_lora_rank"],
            config["index_topk"],
            config["index_n_heads"],
            config["num_experts_per_tok"],
            config["routed_scaling_factor"],
            config["rms_norm_eps"],
            config["rope_parameters"]["rope_theta"],
        )

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [length, rope / 2]."""
        frequencies = self.theta ** -(torch.arange(0, self.rope, 2).float() / self.rope)
        angles = torch.arange(length)[:, None].float() * frequencies
        return angles.cos(), angles.sin()


class Keys(NamedTuple):
    """What one draft of every chain leaves in the cache: keys and values [b, heads, rows, d]."""

    k: Tensor
    v: Tensor

    def first(self, rows: int) -> Keys:
        """Those of the first ``rows`` rows."""
        return Keys(self.k[:, :, :rows], self.v[:, :, :rows])


class Draft:
    """Drafts of all chains of a batch of windows, one `step` after the other.

    Chain r begins at row r; draft number s of it stands at position r + s, and the last rows of a
    window have no further ones.

    Attributes:
        indexer_loss: after a first step with ``learns_index``, the mean KL divergence of the
            indexer from where the layer attends.
        load: how many tokens each expert got in all steps, int64 [experts].
    """

    def __init__(
        self, weights: Weights, shape: Shape, sparse: bool, learns_index: bool = False
    ) -> None:
        self.weights, self.shape = weights, shape
        self.sparse, self.learns_index = sparse, learns_index
        self.keys: list[Keys] = []
        self.mask: Tensor | None = None
        self.indexer_loss: Tensor | None = None
        self.load = torch.zeros(len(weights["mlp.gate.weight"]), dtype=torch.long)

    def step(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The normed states [b, rows, hidden] of the next draft of each chain.

        ``embedded`` [b, rows, hidden] are the tokens that follow the draft's positions, and
        ``hidden`` those positions' states: the model's at first, then what `step` gave, without
        the last row.
        """
        pair = [self._norm("enorm", embedded), self._norm("hnorm", hidden)]
        x = self._linear("eh_proj", torch.cat(pair, dim=-1))
        x = x + self._attend(self._norm("input_layernorm", x))
        rows = self._norm("post_attention_layernorm", x).flatten(0, 1)
        x = x + self._feed_forward(rows).view_as(x)
        return self._norm("shared_head.norm", x)

    def _norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.shape.eps if eps is None else eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _attend(self, x: Tensor) -> Tensor:
        number, rows = len(self.keys), x.shape[1]
        cos, sin = self.shape.angles(rows + number)
        rope = cos[number:], sin[number:]
        q_latent = self._linear("self_attn.q_a_proj", x)
        q_latent = self._norm("self_attn.q_a_layernorm", q_latent, 1e-6)
        q, keys = self._project(x, q_latent, rope)
        self.keys.append(keys)
        if number == 0:
            self._select(x, q_latent, rope)
        assert self.mask is not None
        out, weights = self._over_keys(q, self.mask[..., :rows, :rows])
        if number == 0 and self.learns_index:
            self._learn_index(weights.detach().mean(1))
        return self._linear("self_attn.o_proj", out.transpose(1, 2).flatten(2))

    def _project(
        self, x: Tensor, q_latent: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Keys]:
        """The queries [b, heads, rows, nope + rope], scaled, and the keys, both rotated."""
        shape, w = self.shape, self.weights
        q = self._linear("self_attn.q_b_proj", q_latent).unflatten(-1, (shape.heads, -1))
        q = q.transpose(1, 2)
        q = torch.cat([q[..., : shape.nope], rotate(q[..., shape.nope :], *rope)], dim=-1)
        latent = self._linear("self_attn.kv_a_proj_with_mqa", x)
        latent, k_rope = latent.split([shape.latent, shape.rope], dim=-1)
        latent = self._norm("self_attn.kv_a_layernorm", latent, 1e-6).unsqueeze(1)
        k_rope = rotate(k_rope.unsqueeze(1), *rope).expand(-1, shape.heads, -1, -1)
        k = torch.cat([latent @ w["self_attn.embed_q.weight"], k_rope], dim=-1)
        v = latent @ w["self_attn.unembed_out.weight"].transpose(-1, -2)
        return q * q.shape[-1] ** -0.5, Keys(k, v)

    def _over_keys(self, q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's values, and its weights over the rows of the first step."""
        rows = q.shape[2]
        first, *chain = (keys.first(rows) for keys in self.keys)
        scores = [q @ first.k.transpose(-1, -2) + mask]
        scores += [(q * keys.k).sum(-1, keepdim=True) + self._own(rows) for keys in chain]
        weights = torch.cat(scores, dim=-1).softmax(-1)
        out = weights[..., :rows] @ first.v
        for i, keys in enumerate(chain):
            out = out + weights[..., rows + i : rows + i + 1] * keys.v
        return out, weights

    def _own(self, rows: int) -> Tensor:
        """0 where a chain's drafts see its rows: while no keys are left out; else -inf."""
        hidden = torch.arange(rows)[:, None] >= self.shape.topk
        return torch.zeros(rows, 1).masked_fill(hidden & self.sparse, float("-inf"))

    def _select(self, x: Tensor, q_latent: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """Mask what the chains do not see of the first step's rows: [(b, 1,) rows, rows]."""
        rows = x.shape[1]
        causal = torch.full((rows, rows), float("-inf")).triu(1)
        self.mask = causal
        if not (self.sparse or self.learns_index):
            return
        self.scores = self._index_scores(x.detach(), q_latent.detach(), rope) + causal
        if self.sparse and rows > self.shape.topk:
            chosen = self.scores.detach().topk(self.shape.topk, dim=-1)[1]
            keep = torch.full_like(self.scores.detach(), float("-inf")).scatter_(-1, chosen, 0.0)
            self.mask = (keep + causal).unsqueeze(1)

    def _index_scores(self, x: Tensor, q_latent: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The indexer's scores [b, rows, rows], before the causal mask."""
        prefix, shape, w = "self_attn.indexer", self.shape, self.weights
        q = self._linear(f"{prefix}.wq_b", q_latent).unflatten(-1, (shape.index_heads, -1))
        q = q.transpose(1, 2)
        k = self._linear(f"{prefix}.wk", x)
        norm = w[f"{prefix}.k_norm.weight"], w[f"{prefix}.k_norm.bias"]
        k = F.layer_norm(k, k.shape[-1:], *norm, 1e-6).unsqueeze(1)
        q, k = (
            torch.cat([rotate(part[..., : shape.rope], *rope), part[..., shape.rope :]], dim=-1)
            for part in (q, k)
        )
        scores = F.relu(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        heads = self._linear(f"{prefix}.weights_proj", x) * shape.index_heads**-0.5
        return (scores * heads.transpose(1, 2).unsqueeze(-1)).sum(1)

    def _learn_index(self, target: Tensor) -> None:
        """``indexer_loss``, given the attention [b, rows, rows] of the first step."""
        assert self.mask is not None
        seen = self.mask.squeeze(1) if self.mask.ndim == 4 else self.mask
        log_q = (self.scores + seen).log_softmax(-1)
        log_q = log_q.masked_fill(~torch.isfinite(log_q), 0.0)
        self.indexer_loss = (torch.xlogy(target, target) - target * log_q).sum(-1).mean()

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The experts, routed and shared, of x [n, hidden]."""
        w, k = self.weights, self.shape.experts_per_token
        scores = F.linear(x, w["mlp.gate.weight"]).sigmoid()
        biased = scores.detach() + w["mlp.gate.e_score_correction_bias"]
        chosen = biased.topk(k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.shape.scaling
        self.load += torch.bincount(chosen.flatten(), minlength=len(self.load))
        experts = [w[f"mlp.switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        routed = mix_experts(x, chosen, weights, torch.cat(experts[:2], dim=1), experts[2])
        gate, up = (self._linear(f"mlp.shared_experts.{name}_proj", x) for name in ("gate", "up"))
        both = torch.cat([gate, up], dim=-1)
        return routed + self._linear("mlp.shared_experts.down_proj", swiglu(both))
