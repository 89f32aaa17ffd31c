"""Train the GLM-5.2-shaped demo model on the Python standard library's source.

    python train.py --out demo_hf --deadline 10:25

Three phases, as the DeepSeek-V3.2 report describes for its sparse attention:

1. *dense*: ordinary language modelling, attention over everything, indexers idle;
2. *warm-up*: everything frozen but the indexers, which learn (by a KL loss) to predict where
   attention goes in their own layer and in the layers that share their selection;
3. *sparse*: attention sees only the ``index_topk`` keys that the indexers select; the model
   learns from the language-modelling loss, the indexers from the KL loss over selected keys.

The modules are those of ``transformers``' ``GlmMoeDsaForCausalLM``; only their forward pass is
restated here, in a form that is fast on a CPU and differentiable for the indexers; every run
compares the two at its start and end. The learning rate follows the fraction of the wall-clock
time used between the start and the deadline, so a paused or slowed run still ends on time with
a finished decay.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import held_out_files, held_out_texts, training_files
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    PreTrainedTokenizerFast,
)

EOS = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SPLIT_PATTERN = r"\r?\n *| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+| +|\s"
VOCAB_SIZE = 2048


# ---------------------------------------------------------------------------------------------
# Tokenizer and data


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose words keep newline and indentation together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_files(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Encode every text, each opened by the end-of-text token."""
    eos = tokenizer.eos_token_id
    return [[eos, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


class Batches:
    """Endless shuffled batches of token windows; files are re-shuffled in every epoch."""

    def __init__(self, files: list[list[int]], seed: int) -> None:
        self.files = files
        self.random = random.Random(seed)
        self.stream: list[int] = []
        self.windows: list[int] = []
        self.epochs = 0
        self.length = 0

    def _refill(self, length: int) -> None:
        order = self.files[:]
        self.random.shuffle(order)
        self.stream = [token for ids in order for token in ids]
        start = self.random.randrange(length)
        self.windows = list(range(start, len(self.stream) - length - 1, length))
        self.random.shuffle(self.windows)
        self.epochs += 1
        self.length = length

    def next(self, count: int, length: int) -> Tensor:
        """Return ``[count, length + 1]`` tokens (inputs and targets overlap by all but one)."""
        if self.windows and length == 2 * self.length:
            # Keep what is left of the epoch: join the unread windows where both halves are unread.
            unread = set(self.windows)
            self.windows = []
            for start in sorted(unread):
                if start in unread and start + self.length in unread:
                    self.windows.append(start)
                    unread -= {start, start + self.length}
            self.random.shuffle(self.windows)
            self.length = length
        if len(self.windows) < count or length != self.length:
            self._refill(length)
        starts = [self.windows.pop() for _ in range(count)]
        return torch.tensor([self.stream[s : s + length + 1] for s in starts])


# ---------------------------------------------------------------------------------------------
# Model


def model_config(tokenizer: PreTrainedTokenizerFast) -> GlmMoeDsaConfig:
    """The demo model's shape: GLM-5.2 in small, IndexShare included."""
    layers, freq, offset = 7, 3, 2
    return GlmMoeDsaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        moe_router_dtype="float32",
        first_k_dense_replace=1,
        mlp_layer_types=["dense"] + ["sparse"] * (layers - 1),
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        head_dim=32,
        index_topk=64,
        index_n_heads=4,
        index_head_dim=64,
        index_topk_freq=freq,
        index_skip_topk_offset=offset,
        index_topk_pattern=None,
        index_share_for_mtp_iteration=True,
        indexer_types=[
            "full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)
        ],
        num_nextn_predict_layers=0,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


@torch.no_grad()
def initialise(model: GlmMoeDsaForCausalLM) -> None:
    """Fan-in scaled weights; the projections that write to the residual stream start small."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = parameter.shape[-1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std *= 0.2
        elif "embed_tokens" in name:
            std = 0.3
        elif "lm_head" in name or "mlp.gate.weight" in name:
            std = 0.02
        parameter.normal_(0.0, std)


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
    """The module's RMSNorm through the fused operator."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of a tensor that holds both halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlp_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """A dense SwiGLU block."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def moe_forward(moe: nn.Module, x: Tensor, load: Tensor | None) -> Tensor:
    """Mixture of experts: sort tokens by expert, one small matrix product per expert."""
    gate, experts = moe.gate, moe.experts
    k = gate.top_k
    scores = F.linear(x, gate.weight).sigmoid()
    chosen = (scores.detach() + gate.e_score_correction_bias).topk(k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    counts = torch.bincount(flat, minlength=gate.num_experts)
    if load is not None:
        load += counts
    rows = _Dispatch.apply(x, order, inverse, k).split(counts.tolist())
    outputs = [
        F.linear(swiglu(F.linear(part, gate_up)), down)
        for part, gate_up, down in zip(
            rows, experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True
        )
    ]
    routed = _Permute.apply(torch.cat(outputs), inverse, order).view(-1, k, x.shape[-1])
    mixed = torch.bmm(weights.unsqueeze(1), routed).squeeze(1)
    return mixed + mlp_forward(moe.shared_experts, x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding; pairs come out de-interleaved, as in ``transformers``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def indexer_scores(indexer: nn.Module, x: Tensor, q_resid: Tensor, rope: tuple) -> Tensor:
    """Differentiable ``[B, S, S]`` scores of an indexer, before the causal mask."""
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
class Forward:
    """What a forward pass should do besides computing logits, and what it found."""

    sparse: bool = False
    indexer_loss: bool = False
    loads: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)


def attend(
    attn: nn.Module, x: Tensor, rope: tuple, options: Forward, mask: Tensor, group: dict
) -> Tensor:
    """One attention layer; ``group`` carries a full layer's selection to those sharing it."""
    batch, length, _ = x.shape
    cos, sin = rope
    nope, width = attn.qk_nope_head_dim, attn.qk_rope_head_dim
    q_resid = rms_norm(attn.q_a_layernorm, attn.q_a_proj(x))
    q = attn.q_b_proj(q_resid).view(batch, length, -1, nope + width).transpose(1, 2)
    latent, k_rot = attn.kv_a_proj_with_mqa(x).split([attn.kv_lora_rank, width], dim=-1)
    kv = attn.kv_b_proj(rms_norm(attn.kv_a_layernorm, latent))
    kv = kv.view(batch, length, attn.num_heads, -1).transpose(1, 2)
    k_rot = rotate(k_rot.unsqueeze(1), cos, sin).expand(-1, attn.num_heads, -1, -1)
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], dim=-1)
    k = torch.cat([kv[..., :nope], k_rot], dim=-1)
    v = kv[..., nope:]

    if attn.indexer is not None and (options.sparse or options.indexer_loss):
        finish_group(group, options)
        topk = attn.config.index_topk
        if options.indexer_loss:
            scores = indexer_scores(attn.indexer, x.detach(), q_resid.detach(), rope) + mask
        else:
            with torch.no_grad():
                scores = indexer_scores(attn.indexer, x, q_resid, rope) + mask
        group["scores"], group["targets"], group["keep"] = scores, [], mask
        if options.sparse and topk < length:
            chosen = scores.detach().topk(topk, dim=-1)[1]
            keep = torch.full_like(scores, float("-inf"), requires_grad=False)
            group["keep"] = keep.scatter_(-1, chosen, 0.0) + mask

    if not options.sparse and not options.indexer_loss:
        pad = q.shape[-1] - v.shape[-1] if length > 256 else 0
        out = F.scaled_dot_product_attention(
            q, k, F.pad(v, (0, pad)), is_causal=True, scale=attn.scaling
        )
        out = out[..., : v.shape[-1]]
    else:
        keep = group["keep"]
        bias = keep.unsqueeze(1) if keep.ndim == 3 else keep
        weights = (q @ k.transpose(-1, -2) * attn.scaling + bias).softmax(-1)
        if options.indexer_loss:
            group["targets"].append(weights.detach().mean(1))
        out = weights @ v
    return attn.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def finish_group(group: dict, options: Forward) -> None:
    """Close a group of layers that share one selection: its indexer's KL loss."""
    if not options.indexer_loss or not group.get("targets"):
        return
    target = torch.stack(group["targets"]).mean(0)
    log_q = (group["scores"] + (group["keep"] if options.sparse else 0.0)).log_softmax(-1)
    visible = torch.isfinite(log_q)
    log_q = log_q.masked_fill(~visible, 0.0)
    kl = torch.xlogy(target, target).sum(-1) - (target * log_q).sum(-1)
    options.losses.append(kl.mean())


def forward(model: GlmMoeDsaForCausalLM, tokens: Tensor, options: Forward) -> Tensor:
    """Logits ``[B, S, V]`` of the model for ``tokens`` ``[B, S]``."""
    core = model.model
    length = tokens.shape[1]
    angles = torch.arange(length)[:, None].float() * core.rotary_emb.inv_freq
    rope = (angles.cos(), angles.sin())
    mask = torch.full((length, length), float("-inf")).triu(1)
    group: dict = {}
    x = F.embedding(tokens, core.embed_tokens.weight)
    for index, layer in enumerate(core.layers):
        x = x + attend(
            layer.self_attn, rms_norm(layer.input_layernorm, x), rope, options, mask, group
        )
        hidden = rms_norm(layer.post_attention_layernorm, x)
        if core.config.mlp_layer_types[index] == "sparse":
            load = options.loads[index] if options.loads is not None else None
            hidden = moe_forward(layer.mlp, hidden.flatten(0, 1), load).view_as(x)
        else:
            hidden = mlp_forward(layer.mlp, hidden)
        x = x + hidden
    finish_group(group, options)
    return model.lm_head(rms_norm(core.norm, x))


# ---------------------------------------------------------------------------------------------
# Parallel work


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


def replicate(model: GlmMoeDsaForCausalLM, count: int) -> list[GlmMoeDsaForCausalLM]:
    """``count`` views of the model: shared weights, separate gradients. The first is itself."""
    replicas = [model]
    for _ in range(count - 1):
        replica = GlmMoeDsaForCausalLM(model.config)
        for mine, theirs in zip(replica.parameters(), model.parameters(), strict=True):
            mine.data = theirs.data
        for mine, theirs in zip(replica.buffers(), model.buffers(), strict=True):
            mine.data = theirs.data
        replicas.append(replica)
    return replicas


@torch.no_grad()
def gather_gradients(replicas: list[GlmMoeDsaForCausalLM], workers: Workers) -> None:
    """Add the replicas' gradients to the first model's and drop them."""
    parameters = list(zip(*(replica.parameters() for replica in replicas), strict=True))

    def gather(worker: int) -> None:
        for mine, *others in parameters[worker :: workers.count]:
            for other in others:
                if other.grad is not None:
                    mine.grad = other.grad if mine.grad is None else mine.grad.add_(other.grad)
                    other.grad = None

    workers.map(gather)


# ---------------------------------------------------------------------------------------------
# Optimizer


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon over a batch of wide matrices ``[K, m, n]``, m <= n."""
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
        """One update with learning rate ``rate``."""
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


class Optimizer:
    """Muon for the matrices inside the layers, Adam for everything else."""

    def __init__(
        self, model: GlmMoeDsaForCausalLM, matrix_rate: float, adam_rate: float, workers: Workers
    ) -> None:
        self.workers = workers
        matrices, embeddings, heads, others, indexers = {}, [], [], [], []
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                indexers.append(parameter)
            elif "embed_tokens" in name:
                embeddings.append(parameter)
            elif "lm_head" in name:
                heads.append(parameter)
            elif parameter.ndim < 2 or name.endswith("mlp.gate.weight"):
                others.append(parameter)
            else:
                matrices[name] = parameter
        self.matrix_rate = matrix_rate
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
        self.indexer_parameters = indexers
        self.indexer_adam = torch.optim.AdamW(
            indexers, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.adam_parameters = [*embeddings, *heads, *others]
        self.model_parameters = [*matrices.values(), *self.adam_parameters]

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


# ---------------------------------------------------------------------------------------------
# Saving


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 both load it."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n")


def save(model: GlmMoeDsaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint in the release's layout: bf16, one tensor per expert and projection."""
    copy = GlmMoeDsaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    source = dict(model.state_dict())
    for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "indexer.weights_proj.weight")):
            tensor.data = source[name].detach().float().clone()
    copy.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    copy.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


# ---------------------------------------------------------------------------------------------
# Evaluation


def held_out_windows(
    tokenizer: PreTrainedTokenizerFast, count: int, length: int
) -> tuple[Tensor, float]:
    """A fixed sample of held-out windows, and the mean number of bytes per token in them."""
    files = encode_files(tokenizer, [file.text for file in held_out_files()])
    windows = [
        ids[start : start + length + 1]
        for ids in files
        for start in range(0, len(ids) - length, length)
    ]
    random.Random(0).shuffle(windows)
    windows = windows[:count]
    size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in windows)
    return torch.tensor(windows), size / (len(windows) * length)


def evaluate(model: GlmMoeDsaForCausalLM, windows: Tensor, sparse: bool, workers: Workers) -> float:
    """Mean loss in nats per token over ``windows``."""

    def work(worker: int) -> float:
        total = 0.0
        with torch.no_grad():
            for batch in windows[worker :: workers.count].split(4):
                logits = forward(model, batch[:, :-1], Forward(sparse=sparse))
                total += F.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                ).item()
        return total

    return sum(workers.map(work)) / (windows.shape[0] * (windows.shape[1] - 1))


def sample(folder: Path, log: Logger, prompts: int = 4, new_tokens: int = 160) -> None:
    """Print continuations of held-out functions by the saved checkpoint, run by transformers."""
    model = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [file for file in held_out_texts() if len(file.text) > 4000][:prompts]
    for number, file in enumerate(texts):
        at = file.text.find("\n    def ", len(file.text) // 3)
        at = at if at >= 0 else len(file.text) // 3
        prompt = file.text[max(0, at - 500) : at + 80]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        torch.manual_seed(number)
        options = {"do_sample": True, "temperature": 0.4, "top_k": 20} if number % 2 else {}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
        )
        log(f"--- sample {number} from {file.path} ({'sampled' if options else 'greedy'})")
        log(f"{prompt}⟦{tokenizer.decode(out[0, ids.shape[1] :])}⟧")


# ---------------------------------------------------------------------------------------------
# Training


class Logger:
    """Prints lines with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print one line."""
        minutes = (time.monotonic() - self.start) / 60
        print(f"[{minutes:6.2f}m] {text}", flush=True)


def parse_deadline(text: str) -> float:
    """Seconds from now until ``HH:MM`` today (or tomorrow), or a plain number of minutes."""
    if ":" not in text:
        return float(text) * 60
    hour, minute = map(int, text.split(":"))
    now = datetime.datetime.now()
    then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if then <= now:
        then += datetime.timedelta(days=1)
    return (then - now).total_seconds()


@dataclass
class Plan:
    """Where the phases end, as fractions of the run, and the learning-rate shape."""

    long_context: float = 0.55
    dense: float = 0.74
    warm_up: float = 0.82
    sparse: float = 0.97
    decay_from: float = 0.35
    final: float = 0.02

    def rate(self, progress: float, step: int) -> float:
        """Learning-rate factor: warm-up, constant, then linear to ``final``."""
        span = (progress - self.decay_from) / (self.sparse - self.decay_from)
        decay = 1.0 - (1.0 - self.final) * min(max(span, 0.0), 1.0)
        return min(1.0, (step + 1) / 40) * decay


def balance(model: GlmMoeDsaForCausalLM, loads: Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing: nudge every expert's bias against its load error."""
    for layer, load in zip(model.model.layers, loads.sum(0), strict=True):
        if hasattr(layer.mlp, "gate"):
            error = load.float().mean() - load.float()
            layer.mlp.gate.e_score_correction_bias.add_(error.sign(), alpha=rate)
    loads.zero_()


def set_frozen(replicas: list[GlmMoeDsaForCausalLM], frozen: bool) -> None:
    """Freeze or release everything but the indexers."""
    for replica in replicas:
        for name, parameter in replica.named_parameters():
            if ".indexer." not in name:
                parameter.requires_grad_(not frozen)


def check(model: GlmMoeDsaForCausalLM, tokens: Tensor, log: Logger) -> None:
    """Compare this file's forward pass with that of ``transformers``, dense and sparse."""
    was, topk = model.training, model.config.index_topk
    model.eval()
    with torch.no_grad():
        for sparse in (False, True):
            for layer in model.model.layers:
                if layer.self_attn.indexer is not None:
                    layer.self_attn.indexer.index_topk = topk if sparse else 1 << 20
            ours = forward(model, tokens, Forward(sparse=sparse))
            theirs = model(tokens, use_cache=False).logits
            worst = (ours - theirs).abs().max().item()
            log(f"check sparse={sparse}: largest logit difference to transformers {worst:.2e}")
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.index_topk = topk
    model.train(was)


def keep_memory() -> None:
    """Have glibc reuse large blocks instead of returning them to the kernel every time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
            mallopt(option, value)  # one arena, no mmap, no trimming, growth in large steps


def train(arguments: argparse.Namespace) -> None:
    """Run all phases."""
    keep_memory()
    log = Logger()
    seconds = parse_deadline(arguments.deadline)
    workers = Workers(arguments.threads)
    torch.manual_seed(arguments.seed)
    out = Path(arguments.out)

    texts = [file.text for file in training_files()]
    saved = Path(arguments.tokenizer) if arguments.tokenizer else None
    if saved is not None and (saved / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(saved)
    else:
        tokenizer = train_tokenizer(texts)
        if saved is not None:
            save_tokenizer(tokenizer, saved)
    files = encode_files(tokenizer, texts)
    count = sum(map(len, files))
    log(
        f"{len(texts)} files, {count} tokens, {sum(len(t.encode()) for t in texts) / count:.3f} "
        f"bytes per token, vocabulary {len(tokenizer)}"
    )
    windows, bytes_per_token = held_out_windows(tokenizer, 48, 512)
    log(f"held-out sample: {windows.shape[0]} windows, {bytes_per_token:.3f} bytes per token")

    config = model_config(tokenizer)
    model = GlmMoeDsaForCausalLM(config)
    initialise(model)
    replicas = replicate(model, workers.count)
    optimizer = Optimizer(model, arguments.matrix_rate, arguments.adam_rate, workers)
    log(f"{sum(p.numel() for p in model.parameters())} parameters, threads {arguments.threads}")
    check(model, windows[:1, :256], log)

    loads = torch.zeros(
        workers.count, config.num_hidden_layers, config.n_routed_experts, dtype=torch.long
    )
    plan = Plan()
    seen = step = 0
    start = time.time()
    state = Path(arguments.state) if arguments.state else None
    if state is not None and state.exists():
        kept = torch.load(state)
        start, step, seen = kept["start"], kept["step"], kept["seen"]
        seconds += time.time() - start
        model.load_state_dict(kept["model"])
        for muon, buffers in zip(optimizer.muons, kept["muon"], strict=True):
            for name, buffer in buffers.items():
                muon.buffers[name].copy_(buffer)
        if len(kept["adam"]["param_groups"]) == len(optimizer.adam.param_groups):
            optimizer.adam.load_state_dict(kept["adam"])
        optimizer.indexer_adam.load_state_dict(kept["indexer_adam"])
        log(f"resumed at step {step}, {(time.time() - start) / seconds:.3f} of the run")
    batches = Batches(files, arguments.seed + step)
    early = arguments.early is not None
    saved_at = log.start
    average = None
    mark, mark_seen, spread = time.monotonic(), seen, math.nan

    def report(name: str, sparse_too: bool = True) -> None:
        with torch.random.fork_rng():
            results = {"dense": evaluate(model, windows, False, workers)}
            if sparse_too:
                results["sparse"] = evaluate(model, windows, True, workers)
        text = ", ".join(
            f"{key} {loss:.4f} nats/token = {loss / math.log(2) / bytes_per_token:.4f} bits/byte"
            for key, loss in results.items()
        )
        log(f"held-out ({name}): {text}")

    def backward(tokens: Tensor, sparse: bool, language: bool, indexer: bool) -> Tensor:
        """Forward and backward over a batch; the mean losses ``[language, *indexers]``."""

        def work(worker: int) -> Tensor:
            part = tokens[worker :: workers.count]
            options = Forward(sparse=sparse, indexer_loss=indexer, loads=loads[worker])
            logits = forward(replicas[worker], part[:, :-1], options)
            losses = list(options.losses)
            if language:
                losses.insert(0, F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
            share = torch.stack(losses) * (len(part) / len(tokens))
            share.sum().backward()
            return share.detach()

        results = torch.stack(workers.map(work)).sum(0)
        gather_gradients(replicas, workers)
        return results

    def steps(end: float, least: int = 0) -> Iterator[float]:
        """Fractions of the run used so far, until ``end``; at least ``least`` steps."""
        done = 0
        while (progress := (time.time() - start) / seconds) < end or done < least:
            if arguments.max_steps and done >= arguments.max_steps:
                return
            yield progress
            done += 1

    def keep_state() -> None:
        if state is not None:
            torch.save(
                {
                    "start": start,
                    "step": step,
                    "seen": seen,
                    "model": model.state_dict(),
                    "muon": [muon.buffers for muon in optimizer.muons],
                    "adam": optimizer.adam.state_dict(),
                    "indexer_adam": optimizer.indexer_adam.state_dict(),
                },
                state.with_suffix(".new"),
            )
            state.with_suffix(".new").replace(state)

    # Phase 1: dense.
    for progress in steps(plan.dense):
        length = 256 if progress < plan.long_context else 512
        tokens = batches.next(arguments.batch_tokens // length, length)
        loss = backward(tokens, sparse=False, language=True, indexer=False)[0]
        factor = plan.rate(progress, step)
        optimizer.step(factor)
        optimizer.zero()
        if step % 100 == 0:
            share = loads.sum(0)[1:].float()
            spread = (share.max(1).values / share.mean(1)).mean().item()
        balance(model, loads, 0.004 * max(factor, 0.1))
        seen += tokens.shape[0] * length
        step += 1
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 20 == 0 or step < 4:
            now = time.monotonic()
            speed = (seen - mark_seen) / (now - mark)
            mark, mark_seen = now, seen
            log(
                f"dense step {step} tokens {seen} ({seen / count:.2f} epochs) loss {average:.4f} "
                f"rate {factor:.3f} load {spread:.2f} {speed:.0f} tok/s"
            )
        if step % 400 == 0:
            report(f"step {step}", sparse_too=False)
        if early and time.monotonic() - log.start > arguments.early_minutes * 60:
            save(model, tokenizer, Path(arguments.early))
            log(f"early checkpoint written to {arguments.early}")
            early = False
        if time.monotonic() - saved_at > 300:
            save(model, tokenizer, out)
            keep_state()
            saved_at = time.monotonic()
    report("end of dense phase")
    save(model, tokenizer, out)
    keep_state()

    # Phase 2: indexer warm-up, everything else frozen.
    set_frozen(replicas, True)
    average = None
    for warm, progress in enumerate(steps(plan.warm_up, least=60), start=1):
        tokens = batches.next(arguments.batch_tokens // 512, 512)
        value = backward(tokens, sparse=False, language=False, indexer=True)
        span = (progress - plan.dense) / (plan.warm_up - plan.dense)
        optimizer.step_indexers(4e-3 * min(1.0, warm / 10) * (1.0 - 0.8 * span))
        optimizer.zero()
        average = value if average is None else 0.9 * average + 0.1 * value
        if warm % 10 == 0 or warm < 4:
            log(f"warm-up step {warm} KL {[round(v, 4) for v in average.tolist()]}")
    set_frozen(replicas, False)
    report("end of warm-up")
    save(model, tokenizer, out)
    keep_state()

    # Phase 3: sparse.
    average = None
    mark, mark_seen = time.monotonic(), seen
    first = step
    saved_at = time.monotonic()
    for progress in steps(plan.sparse):
        tokens = batches.next(arguments.batch_tokens // 512, 512)
        losses = backward(tokens, sparse=True, language=True, indexer=True)
        factor = plan.rate(progress, step)
        optimizer.step(factor)
        optimizer.step_indexers(8e-4 * min(1.0, factor / 0.35))
        optimizer.zero()
        balance(model, loads, 0.004 * factor)
        seen += tokens.shape[0] * 512
        step += 1
        now = torch.stack([losses[0], losses[1:].sum()])
        average = now if average is None else 0.95 * average + 0.05 * now
        if step % 20 == 0 or step < first + 4:
            now = time.monotonic()
            speed = (seen - mark_seen) / (now - mark)
            mark, mark_seen = now, seen
            log(
                f"sparse step {step} tokens {seen} ({seen / count:.2f} epochs) "
                f"loss {average[0]:.4f} KL {average[1]:.4f} rate {factor:.3f} {speed:.0f} tok/s"
            )
        if time.monotonic() - saved_at > 300:
            save(model, tokenizer, out)
            keep_state()
            saved_at = time.monotonic()
    report("end of sparse phase")
    save(model, tokenizer, out)
    log(f"saved to {out}; {seen} tokens seen in {step} steps, process {time.process_time():.0f} s")

    check(model, windows[:2, :-1], log)
    again = GlmMoeDsaForCausalLM.from_pretrained(out, dtype=torch.float32)
    loss = evaluate(again, windows, True, workers)
    log(f"reloaded from disk: sparse loss {loss:.4f}")
    sample(out, log)
    log(json.dumps({"tokens": seen, "steps": step, "sparse_loss": loss}))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--state", help="file for the training state; resumed from if present")
    parser.add_argument("--early", help="folder of an early checkpoint of the same shape")
    parser.add_argument("--early-minutes", type=float, default=12.0)
    parser.add_argument("--tokenizer", help="folder to keep the tokenizer in, read if present")
    parser.add_argument("--deadline", default="70", help="HH:MM, or minutes from now")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument("--max-steps", type=int, default=0, help="end each phase here (a test)")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
