"""Takes transformers as the oracle of logits, keys and experts, and of how clear a choice is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers.modeling_rope_utils as rope_utils
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm
from weights import Tensors

Model = nn.Module


@dataclass
class Choices:
    """What one prefill selected; a margin is the smallest gap at any boundary of a selection."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None  # behind the logits
    topk: dict[int, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    index_scores: dict[int, torch.Tensor] = field(default_factory=dict)  # -inf where not causal
    index_margin: float = float("inf")
    expert_margin: float = float("inf")
    group_margin: float = float("inf")
    index_zeros: float = 0.0

    @property
    def margin(self) -> float:
        return min(self.index_margin, self.expert_margin, self.group_margin)

    def same_selection(self, other: "Choices") -> bool:
        """Whether both chose the same keys and experts for every query and layer."""
        return all(
            torch.equal(mine[i], theirs[i])
            for mine, theirs in ((self.topk, other.topk), (self.experts, other.experts))
            for i in mine
        )

    def index_noise(self, exact: "Choices") -> tuple[float, float]:
        """The largest and the rms error of the index scores, on the scale of index_margin."""
        largest = rms = 0.0
        for layer, scores in exact.index_scores.items():
            causal = scores.isfinite()
            error = (self.index_scores[layer] - scores)[causal] / scores[causal].std()
            largest = max(largest, error.abs().max().item())
            rms = max(rms, error.square().mean().sqrt().item())
        return largest, rms


def _stack_experts(tensors: Tensors) -> Tensors:
    """Stack per-expert tensors to the fused parameters that transformers holds in memory."""
    stacked: Tensors = {k: v for k, v in tensors.items() if ".mlp.experts." not in k}
    for name in tensors:
        layer, found, _ = name.partition(".mlp.experts.0.down_proj")
        if not found:
            continue
        experts = f"{layer}.mlp.experts"
        count = sum(k.startswith(experts) for k in tensors) // 3
        gate, up, down = (
            torch.stack([tensors[f"{experts}.{e}.{part}_proj.weight"] for e in range(count)])
            for part in ("gate", "up", "down")
        )
        stacked[f"{experts}.gate_up_proj"] = torch.cat([gate, up], 1)
        stacked[f"{experts}.down_proj"] = down
    return stacked


def build(config_dir: Path, tensors: Tensors) -> Model:
    """The eager fp32 model of a config.json, with these weights (FP8 already dequantized)."""
    config = AutoConfig.from_pretrained(config_dir)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    layer = _mtp_layer(config)
    decoder = {k: v for k, v in tensors.items() if not k.startswith(layer)}
    model.load_state_dict(_stack_experts(decoder), strict=True)
    return model.eval()


def _mtp_layer(config: Any) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def build_mtp(model: Model, tensors: Tensors) -> MtpModel:
    """The MTP layer beside a model, as transformers has it for any kind of model.

    For GLM-5 that lacks what the config calls the layer's kinds, and takes a layer's output for its
    hidden states, where GLM-5's layers give their selection besides.
    """
    config = model.config
    config.num_mtp_layers = 1
    config.mtp_layer_types, config.mtp_mlp_layer_types = ["full_attention"], ["sparse"]
    mtp, layer = MtpModel(model, 1), _mtp_layer(config)
    own = ("eh_proj", "enorm", "hnorm", "shared_head")
    named = {}
    for name, tensor in _stack_experts(tensors).items():
        rest = name.removeprefix(layer)
        if rest != name:
            rest = rest if rest.startswith(own) else f"mtp_block.{rest}"
            named[f"layers.0.{rest.replace('shared_head.norm', 'post_norm')}"] = tensor
    missing, unexpected = mtp.load_state_dict(named, strict=False)
    assert not unexpected, unexpected
    assert set(missing) == {"embed_tokens.weight", "shared_head.weight"}, missing  # the model's
    block = mtp.layers[0].mtp_block
    block.register_forward_hook(lambda block, args, output: output[0])
    return mtp.eval()


@torch.no_grad()
def drafts(mtp: MtpModel, tokens: torch.Tensor, hidden: torch.Tensor) -> Choices:
    """What the layer gives for the tokens [1, L] after states [1, L, hidden], all at once."""
    found, block = Choices(logits=torch.empty(0)), mtp.layers[0].mtp_block
    hooks = [
        block.self_attn.indexer.register_forward_hook(_record_indexer(found, 0)),
        block.mlp.gate.register_forward_hook(_record_router(found, 0)),
    ]
    positions = torch.arange(1, 1 + tokens.shape[1])[None]
    found.hidden = mtp.forward_layer(0, hidden, positions, None, input_ids=tokens.long())
    found.logits = mtp._project_to_logits(found.hidden)
    for hook in hooks:
        hook.remove()
    return found


class _Float64Torch:
    """The torch module as modelling code sees it, with its fp32 casts turned into fp64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@contextmanager
def float64() -> Iterator[None]:
    """Within the block, oracle code computes in fp64 where it would insist on fp32."""
    with ExitStack() as stack:
        for module in (deepseek, glm, rope_utils):
            stack.enter_context(patch.object(module, "torch", _Float64Torch()))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def _index_scores(indexer: nn.Module, args: tuple[Any, ...]) -> torch.Tensor:
    """The scores [S, T] behind an indexer's selection, which it does not return."""
    hidden, q_resid, (cos, sin) = args[:3]
    is_glm = isinstance(indexer, glm.GlmMoeDsaIndexer)
    rotate = glm.apply_rotary_pos_emb_interleave if is_glm else deepseek.apply_rotary_pos_emb
    rope = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    q_rot, k_rot = rotate(q[..., :rope], k[..., :rope], cos, sin, unsqueeze_dim=2)
    q = torch.cat([q_rot, q[..., rope:]], -1)[0]
    k = torch.cat([k_rot, k[..., rope:]], -1)[0, :, 0]
    scores = torch.relu(torch.einsum("shd,td->sht", q, k) * indexer.head_dim**-0.5)
    weights = indexer.weights_proj(hidden)[0] * indexer.n_heads**-0.5
    return torch.einsum("sh,sht->st", weights, scores)


def _record_indexer(found: Choices, layer: int) -> Any:
    def hook(indexer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        scores, k = _index_scores(indexer, args), indexer.index_topk
        causal = torch.ones_like(scores, dtype=torch.bool).tril()
        found.index_scores[layer] = scores.masked_fill(~causal, -torch.inf)
        best = found.index_scores[layer].topk(k + 1)[0]
        gaps = (best[:, k - 1] - best[:, k])[k:] / scores[causal].std()
        found.index_margin = min(found.index_margin, gaps.min().item())
        found.index_zeros = max(found.index_zeros, (scores[causal] == 0).float().mean().item())
        rows = torch.arange(output.shape[1])[:, None]
        chosen, beyond = output[0], len(rows)
        chosen = chosen.masked_fill(chosen > rows, beyond).sort(-1)[0]
        found.topk[layer] = chosen.masked_fill(chosen == beyond, -1).to(torch.int16)

    return hook


def _record_router(found: Choices, layer: int) -> Any:
    def hook(router: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        logits, _, chosen = output
        scores = (logits.sigmoid() + router.e_score_correction_bias).unflatten(
            -1, (router.num_group, -1)
        )
        if router.num_group > 1:
            best, groups = scores.topk(2)[0].sum(-1).sort(-1, descending=True)
            gaps = best[:, router.topk_group - 1] - best[:, router.topk_group]
            found.group_margin = min(found.group_margin, gaps.min().item())
            rejected = groups[:, router.topk_group :, None].expand(-1, -1, scores.shape[-1])
            scores = scores.scatter(1, rejected, -torch.inf)
        best = scores.flatten(1).sort(-1, descending=True)[0]
        gaps = best[:, router.top_k - 1] - best[:, router.top_k]
        found.expert_margin = min(found.expert_margin, gaps.min().item())
        found.experts[layer] = chosen.sort(-1)[0]

    return hook


@torch.no_grad()
def prefill(model: Model, tokens: torch.Tensor) -> Choices:
    """The logits and choices of one prompt [1, L], all at once."""
    found = Choices(logits=torch.empty(0))
    hooks = []
    for i, layer in enumerate(model.model.layers):
        if layer.self_attn.indexer is not None:
            hooks.append(layer.self_attn.indexer.register_forward_hook(_record_indexer(found, i)))
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(_record_router(found, i)))
    out = model.model(tokens.long(), use_cache=False)
    found.hidden, found.logits = out.last_hidden_state, model.lm_head(out.last_hidden_state)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def decode(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the same prompt, one token at a time through transformers' cache."""
    cache = DynamicCache(config=model.config)
    steps = [
        model(tokens[:, i : i + 1].long(), past_key_values=cache, use_cache=True).logits
        for i in range(tokens.shape[1])
    ]
    return torch.cat(steps, 1)


def read_with_transformers(case_dir: Path) -> Model:
    """Load the stored checkpoint by from_pretrained, to prove that it reads as a release does."""
    return AutoModelForCausalLM.from_pretrained(
        case_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
