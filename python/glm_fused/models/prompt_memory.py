"""What a prompt takes in memory: the model's weights, its cache, and temporaries of a chunk of it.

mlx-lm gives a model the tokens of a prompt in chunks; their size is the prefill step. Weights and
cache have a size that does not depend on it, temporaries grow with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from .. import _ext
from ..ops import blocks
from ..ops.chunks import BUDGET_BYTES
from .cache import bytes_per_token
from .config import ModelArgs

STEPS = (2048, 1024, 512, 256, 128, 64, 32)  # prefill steps; the first is mlx-lm's
SHARED_STEP = 512  # of ranks that share a model: what fits in memory may differ between machines
# What kernels of the CPU take, for the queries or tokens that they take together (csrc/cpu).
SCORES, ATTENTION, MOE_TOKENS, MATVEC_ROWS = 64 << 20, 32 << 20, 512, 64
MOST_DRAFTS = 8  # tokens that are guessed at a time
MOST_WAITING = 4096  # tokens whose hidden states are kept until there is a draft of the MTP layer
SMALL_ARRAYS = 1 << 20  # masks, positions
SIDE_BY_SIDE = 4  # kernels of a recorded decode step that have scratch memory at a time
LAYERS_AHEAD = 2  # MLX makes nodes' outputs, until some 100 tasks wait, while others run


@dataclass(frozen=True)
class PromptPlan:
    """What a prompt is planned to take at most.

    Attributes:
        prefill_step_size: tokens that the model takes at a time.
        context: tokens of the prompt and of what follows it.
        weights: bytes of the model's weights, and of slots for experts that are streamed.
        cache: bytes of the cache of ``context`` tokens, with room to grow.
        temporaries: bytes of a chunk's arrays and of the kernels' scratch memory.
    """

    prefill_step_size: int
    context: int
    weights: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """The planned peak, in bytes; the program itself is not in it."""
        return self.weights + self.cache + self.temporaries

    def describe(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return asdict(self) | {"total": self.total}


def fitting_step(total: Callable[[int], int], budget: int) -> int:
    """The largest of `STEPS` with which ``total`` bytes fit in the budget, or the smallest.

    A chunk of a prompt reads every expert once, however long it is, so a long one is worth more
    than what else the memory could hold.
    """
    return next((step for step in STEPS if total(step) <= budget), STEPS[-1])


def cache_bytes(args: ModelArgs, context: int, kv_format: str) -> int:
    """The bytes of a KV cache that grew to ``context`` tokens."""
    # It grows in steps of 256 tokens or an eighth, by copying one layer at a time.
    tokens = context + max(256, context // 8)
    cached = bytes_per_token(args, kv_format) * tokens
    return cached + cached // len(args.model_layers)


def chunk_bytes(
    args: ModelArgs,
    step: int,
    context: int,
    float_bytes: int,
    streamed: bool,
    ranks: int = 1,
) -> int:
    """The most bytes that a prompt of ``context`` tokens takes besides weights and cache.

    They are those of a layer's arrays, of kernels besides them, of recorded decode steps, and of
    hidden states that the MTP layer has not taken yet.

    Args:
        step: tokens that the model takes at a time.
        context: tokens of the prompt and of what follows it.
        float_bytes: of a value of the activations.
        streamed: whether routed experts are; they are then gathered, in waves.
        ranks: how many processes share the model.
    """
    tokens = min(step, context)
    # What a layer makes may be there all at once, because memory is given to nodes in advance.
    layers = LAYERS_AHEAD * tokens * _layer_bytes(args, context, float_bytes, streamed, ranks)
    scratch = _scratch_bytes(args, tokens, context)
    logits = 4 * args.vocab_size * (min(tokens, blocks.MAX_TOKENS) + 8)
    waiting = args.has_mtp * min(context, MOST_WAITING) * args.hidden_size * float_bytes
    waiting *= 2  # one by one and, when the layer takes them, joined
    total = layers + scratch + logits + waiting + SMALL_ARRAYS
    if streamed or ranks > 1 or mx.default_device() == mx.gpu:
        return total
    # A recorded step holds what all layers make. There is one for a token and one for what is left
    # of a prompt, and, of a token and of short chunks, one each for few cached keys and for many.
    few = min(tokens, blocks.MAX_TOKENS)
    recorded = 2 + (1 if tokens > few else 3) * few
    if args.has_mtp:  # of each number of drafts that are verified, for few keys and for many
        recorded += 2 * sum(range(2, 2 + MOST_DRAFTS))
    layer = _layer_bytes(args, context, float_bytes, streamed, ranks)
    together = SIDE_BY_SIDE * _scratch_bytes(args, few, context)
    return total + recorded * layer * len(args.model_layers) + together


def _layer_bytes(
    args: ModelArgs, context: int, float_bytes: int, streamed: bool, ranks: int
) -> int:
    """The bytes a token of all arrays that a layer makes."""
    values = _attention_values(args) + _mlp_values(args, streamed, ranks)
    fp32 = args.num_attention_heads * args.kv_lora_rank + 2 * args.index_n_heads
    fp32 += 2 * min(context, args.index_topk) + 4 * args.num_experts_per_tok  # integers among them
    return float_bytes * values + 4 * fp32


def _attention_values(args: ModelArgs) -> int:
    """Values a token of the arrays that attention makes, in the type of the activations."""
    heads, rope = args.num_attention_heads, args.qk_rope_head_dim
    latent = args.kv_lora_rank + rope
    queries = heads * (args.qk_nope_head_dim + rope) + heads * (args.kv_lora_rank + rope)
    joined = 2 * heads * latent  # and copied, head by head
    index = 4 * args.index_n_heads * args.index_head_dim + 4 * args.index_head_dim
    output = heads * args.kv_lora_rank + 2 * heads * args.v_head_dim
    small = 5 * args.hidden_size + 2 * args.q_lora_rank + 4 * latent
    return small + queries + joined + index + output


def _mlp_values(args: ModelArgs, streamed: bool, ranks: int) -> int:
    """The same of the MLP, whichever kind takes more."""
    hidden, width = args.hidden_size, args.moe_intermediate_size
    dense = 3 * args.intermediate_size
    sparse = 3 * width * (args.n_shared_experts or 0) + 3 * hidden
    if ranks > 1:  # of every choice, what a rank has and what is joined
        own = -(-(3 * width + 3 * hidden) // ranks)
        sparse += args.num_experts_per_tok * (own + 2 * width + hidden * streamed) + 2 * hidden
    elif mx.default_device() == mx.gpu:  # of every choice
        sparse += args.num_experts_per_tok * (3 * width + 3 * hidden)
    elif streamed:  # gathered rows, what experts make of them, joined, put in order
        sparse += 4 * args.num_experts_per_tok * hidden
    return max(dense, sparse) + 4 * hidden


def _scratch_bytes(args: ModelArgs, tokens: int, context: int) -> int:
    """The bytes of scores and of what is computed from them, within the limits of the ops."""
    sparse, listed = context > args.index_topk, min(context, args.index_topk)
    heads, latent = args.num_attention_heads, args.kv_lora_rank + args.qk_rope_head_dim
    if mx.default_device() == mx.gpu:  # where a Metal kernel does not apply, stock ops run
        scores = 4 * tokens * context * args.index_n_heads if sparse else 0
        attended = 4 * tokens * listed * (heads + sparse * latent)
        stock = 4 * min(BUDGET_BYTES, max(scores, attended))
        index = _ext.index_scratch_bytes(tokens, context, args.index_topk) if sparse else 0
        return max(stock, LAYERS_AHEAD * index)  # kept until a layer's launches are done
    threads = _ext.num_threads()
    lanes = -(-heads // 16) * 16
    query = 4 * lanes * (listed + latent) * 5 // 4  # with its lists and sums
    attention = max(query * min(threads, tokens), min(ATTENTION * 5 // 4, query * tokens))
    attention += threads * 4 * lanes * latent
    packed = 4 * args.index_n_heads * args.index_head_dim
    scored = max(4 * context, min(SCORES, 4 * tokens * context)) if sparse else 0
    index = sparse * (scored + tokens * 2 * packed + threads * 4 * 2 * context)
    pairs = min(MOE_TOKENS, tokens) * args.num_experts_per_tok
    hidden, width = args.hidden_size, args.moe_intermediate_size
    experts = 5 * pairs * (3 * hidden + 2 * width) + 4 * tokens * args.num_experts_per_tok
    widest = max(hidden, args.intermediate_size, heads * max(args.v_head_dim, args.kv_lora_rank))
    matvec = threads * 4 * MATVEC_ROWS * 2 * widest
    return attention + index + experts + matvec
