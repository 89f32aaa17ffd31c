"""The model's forward pass, fast on a CPU and differentiable for the indexers.

It works on the modules of ``transformers``' ``GlmMoeDsaForCausalLM``; ``evaluation.check`` compares
it with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmMoeDsaForCausalLM


class _Dispatch(torch.autograd.Function):
    """Gather rows for experts: ``x[N, D] -> x[order // k]``, with a gather as its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad.view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """A row permutation whose backward is the inverse permutation."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Apply the module's RMSNorm through the fused operator."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of a tensor that holds both halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlp_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """Apply a dense SwiGLU block."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def moe_forward(moe: nn.Module, x: Tensor, load: Tensor | None) -> Tensor:
    """Apply a mixture of experts to ``x[N, D]``, shared experts included."""
    gate, experts = moe.gate, moe.experts
    scores = F.linear(x, gate.weight).sigmoid()
    biased = scores.detach() + gate.e_score_correction_bias
    chosen = biased.topk(gate.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    if load is not None:
        load += torch.bincount(chosen.flatten(), minlength=gate.num_experts)
    mixed = mix_experts(x, chosen, weights, experts.gate_up_proj, experts.down_proj)
    return mixed + mlp_forward(moe.shared_experts, x)


def mix_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Sum each row's experts: sort rows by expert, then one matrix product per expert.

    ``chosen`` and ``weights`` are ``[N, k]``, ``gate_up`` ``[E, 2 I, D]`` and ``down``
    ``[E, D, I]``.
    """
    k = chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    counts = torch.bincount(flat, minlength=len(down))
    rows = _Dispatch.apply(x, order, inverse, k).split(counts.tolist())
    outputs = [
        F.linear(swiglu(F.linear(part, first)), second)
        for part, first, second in zip(rows, gate_up.unbind(0), down.unbind(0), strict=True)
    ]
    routed = _Permute.apply(torch.cat(outputs), inverse, order).view(-1, k, x.shape[-1])
    return torch.bmm(weights.unsqueeze(1), routed).squeeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply interleaved rotary embedding; pairs come out de-interleaved, as in ``transformers``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def indexer_scores(indexer: nn.Module, x: Tensor, q_resid: Tensor, rope: tuple) -> Tensor:
    """The differentiable scores ``[B, S, S]`` of an indexer, before the causal mask."""
    cos, sin = rope
    batch, length, _ = x.shape
    width = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).view(batch, length, indexer.n_heads, indexer.head_dim).transpose(1, 2)
    k = indexer.k_norm(indexer.wk(x)).unsqueeze(1)
    q = torch.cat([rotate(q[..., :width], cos, sin), q[..., width:]], dim=-1)
    k = torch.cat([rotate(k[..., :width], cos, sin), k[..., width:]], dim=-1)
    scores = F.relu(q @ k.transpose(-1, -2) * indexer.softmax_scale)  # [B, H, S, S]
    weights = indexer.weights_proj(x) * indexer.n_heads**-0.5  # [B, S, H]
    return (scores * weights.transpose(1, 2).unsqueeze(-1)).sum(1)


@dataclass
class Group:
    """Layers that share one selection: the indexer's scores, and a mask of the keys it kept."""

    scores: Tensor
    keep: Tensor
    targets: list[Tensor] = field(default_factory=list)  # each layer's attention, over its heads


@dataclass
class Forward:
    """What a forward pass should do besides computing logits, and what it found."""

    sparse: bool = False
    indexer_loss: bool = False
    loads: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    group: Group | None = None

    @property
    def selects(self) -> bool:
        """Whether the indexers have anything to do."""
        return self.sparse or self.indexer_loss


def project(attn: nn.Module, x: Tensor, q_resid: Tensor, rope: tuple) -> tuple[Tensor, ...]:
    """The queries, keys and values ``[B, H, S, D]`` of an attention layer, rotated."""
    batch, length, _ = x.shape
    cos, sin = rope
    nope, width = attn.qk_nope_head_dim, attn.qk_rope_head_dim
    q = attn.q_b_proj(q_resid).view(batch, length, -1, nope + width).transpose(1, 2)
    latent, k_rot = attn.kv_a_proj_with_mqa(x).split([attn.kv_lora_rank, width], dim=-1)
    kv = attn.kv_b_proj(rms_norm(attn.kv_a_layernorm, latent))
    kv = kv.view(batch, length, attn.num_heads, -1).transpose(1, 2)
    k_rot = rotate(k_rot.unsqueeze(1), cos, sin).expand(-1, attn.num_heads, -1, -1)
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], dim=-1)
    k = torch.cat([kv[..., :nope], k_rot], dim=-1)
    return q, k, kv[..., nope:]


def open_group(
    attn: nn.Module, x: Tensor, q_resid: Tensor, rope: tuple, options: Forward, mask: Tensor
) -> Group:
    """Make the selection of a full layer's indexer, for itself and the layers that share it."""
    if options.indexer_loss:
        scores = indexer_scores(attn.indexer, x.detach(), q_resid.detach(), rope) + mask
    else:
        with torch.no_grad():
            scores = indexer_scores(attn.indexer, x, q_resid, rope) + mask
    topk = attn.config.index_topk
    if not options.sparse or topk >= x.shape[1]:
        return Group(scores, mask)
    chosen = scores.detach().topk(topk, dim=-1)[1]
    keep = torch.full_like(scores, float("-inf"), requires_grad=False)
    return Group(scores, keep.scatter_(-1, chosen, 0.0) + mask)


def close_group(options: Forward) -> None:
    """Add the group's KL loss: how far its indexer is from where its layers attend."""
    group = options.group
    if group is None or not options.indexer_loss:
        return
    target = torch.stack(group.targets).mean(0)
    log_q = (group.scores + (group.keep if options.sparse else 0.0)).log_softmax(-1)
    visible = torch.isfinite(log_q)
    log_q = log_q.masked_fill(~visible, 0.0)
    kl = torch.xlogy(target, target).sum(-1) - (target * log_q).sum(-1)
    options.losses.append(kl.mean())


def attend_all(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally to every key, by the fused operator."""
    pad = q.shape[-1] - v.shape[-1] if q.shape[2] > 256 else 0
    out = F.scaled_dot_product_attention(
        q, k, F.pad(v, (0, pad)), is_causal=True, scale=attn.scaling
    )
    return out[..., : v.shape[-1]]


def attend_group(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, group: Group, keep_target: bool
) -> Tensor:
    """Attend to the keys that the group keeps; ``keep_target`` serves its indexer's loss."""
    bias = group.keep.unsqueeze(1) if group.keep.ndim == 3 else group.keep
    weights = (q @ k.transpose(-1, -2) * attn.scaling + bias).softmax(-1)
    if keep_target:
        group.targets.append(weights.detach().mean(1))
    return weights @ v


def attend(attn: nn.Module, x: Tensor, rope: tuple, options: Forward, mask: Tensor) -> Tensor:
    """Apply an attention layer; a full one opens the group of layers that share its selection."""
    q_resid = rms_norm(attn.q_a_layernorm, attn.q_a_proj(x))
    q, k, v = project(attn, x, q_resid, rope)
    if attn.indexer is not None and options.selects:
        close_group(options)
        options.group = open_group(attn, x, q_resid, rope, options, mask)
    if options.selects:
        out = attend_group(attn, q, k, v, options.group, options.indexer_loss)
    else:
        out = attend_all(attn, q, k, v)
    return attn.o_proj(out.transpose(1, 2).flatten(2))


def forward(model: GlmMoeDsaForCausalLM, tokens: Tensor, options: Forward) -> Tensor:
    """The logits ``[B, S, V]`` of the model for ``tokens`` ``[B, S]``."""
    core = model.model
    length = tokens.shape[1]
    angles = torch.arange(length)[:, None].float() * core.rotary_emb.inv_freq
    rope = (angles.cos(), angles.sin())
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = F.embedding(tokens, core.embed_tokens.weight)
    for index, layer in enumerate(core.layers):
        x = x + attend(layer.self_attn, rms_norm(layer.input_layernorm, x), rope, options, mask)
        hidden = rms_norm(layer.post_attention_layernorm, x)
        if core.config.mlp_layer_types[index] == "sparse":
            load = options.loads[index] if options.loads is not None else None
            hidden = moe_forward(layer.mlp, hidden.flatten(0, 1), load).view_as(x)
        else:
            hidden = mlp_forward(layer.mlp, hidden)
        x = x + hidden
    close_group(options)
    return model.lm_head(rms_norm(core.norm, x))
