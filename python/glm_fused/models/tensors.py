"""The tensor table: every module of a model, with its shapes and the names it is stored under.

The table serves ``glm_moe_dsa`` and ``deepseek_v32``, and follows from the config alone. All code
that compares, loads, streams, counts or splits tensors reads it.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from .config import ModelArgs
from .layer_spec import LayerSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which checkpoints store a module's weight.

    Attributes:
        path: where the weight and its scales are stored; ``{}`` stands for the number of an expert
            that has tensors of its own.
        shape: the shape of the tensor, or of one expert's where experts have tensors of their own.
        suffix: what the weight's name has after ``path``.
        sign: the tensor whose presence tells that a checkpoint has this form; None where that is
            the weight itself.
        first_row: the row at which the module begins within each expert or head of a tensor that
            several modules share.
        kind: what reports call a tensor that several modules share.
    """

    path: str
    shape: tuple[int, ...]
    suffix: str = ".weight"
    sign: str | None = None
    first_row: int = 0
    kind: str | None = None

    @property
    def of_single_experts(self) -> bool:
        """Whether every expert has tensors of its own."""
        return "{}" in self.path

    def paths(self, experts: int) -> Iterator[str]:
        """The path, or where experts have their own, the path of each of ``experts``."""
        if not self.of_single_experts:
            yield self.path
        else:
            yield from (self.path.replace("{}", str(e)) for e in range(experts))

    def is_in(self, names: Container[str]) -> bool:
        """Whether tensors of these names have the weight in this form."""
        sign = self.sign or self.path.replace("{}", "0") + self.suffix
        return sign in names or f"{sign}_packed" in names


@dataclass(frozen=True, slots=True)
class Module:
    """A module that owns a ``weight``, named as in the model.

    Attributes:
        path: its name in the model.
        shape: the shape of its weight.
        kind: the group of modules that reports count it in.
        quantizable: whether checkpoints may store its weight quantized.
        sensitive: whether it stays as it is when this package has a model quantized.
        bias: the name under ``path`` and the size of a second tensor.
        experts: the number of stacked experts, else 0.
        shard: the axis of ``shape`` that ranks split, or None where each has all of it: what is
            small, and what every rank computes for itself (`glm_fused.models.shard`). It is never
            the last: a dot product is computed whole.
        together: how many along that axis stay on one rank, those of a head; None: whole tiles of
            rows, as the formats ask for.
        other_forms: the forms, beside ``path`` and ``shape``, in which the weight may be stored.
            Where a checkpoint in the release's layout has none, errors name the first as missing.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    quantizable: bool = True
    sensitive: bool = False
    bias: tuple[str, int] | None = None
    experts: int = 0
    shard: int | None = None
    together: int | None = None
    sign: str | None = None
    other_forms: tuple[Form, ...] = ()

    @property
    def form(self) -> Form:
        """The form that the model itself has."""
        return Form(self.path, self.shape, sign=self.sign)

    def form_in(self, names: Container[str], default: int = 0) -> Form:
        """The form that tensors of these names have, or else form number ``default``."""
        forms = (self.form, *self.other_forms)
        for form in forms:
            if form.is_in(names):
                return form
        return forms[min(default, len(forms) - 1)]


def modules(args: ModelArgs) -> Iterator[Module]:
    """The modules of the model in execution order."""
    vocab, hidden = args.vocab_size, args.hidden_size
    # Each rank needs all of an embedding that is the head too, and computes its logits alone.
    shard = None if args.tie_word_embeddings else 0
    yield Module("model.embed_tokens", (vocab, hidden), "embedding", shard=shard)
    for layer in args.model_layers:
        yield from layer_modules(args, layer)
    yield _norm("model.norm", hidden)
    if not args.tie_word_embeddings:
        yield Module("lm_head", (vocab, hidden), "head", shard=0)


def layer_modules(args: ModelArgs, layer: LayerSpec) -> Iterator[Module]:
    """The modules of one layer, of the decoder or for MTP."""
    prefix, hidden = f"model.layers.{layer.index}", args.hidden_size
    if layer.role == "mtp":
        yield _norm(f"{prefix}.enorm", hidden)
        yield _norm(f"{prefix}.hnorm", hidden)
        yield Module(f"{prefix}.eh_proj", (hidden, 2 * hidden), "MTP", shard=0)
    yield _norm(f"{prefix}.input_layernorm", hidden)
    yield from _attention(args, f"{prefix}.self_attn")
    if layer.is_full:
        yield from _indexer(args, f"{prefix}.self_attn.indexer")
    yield _norm(f"{prefix}.post_attention_layernorm", hidden)
    if layer.is_sparse:
        yield from _moe(args, f"{prefix}.mlp", layer.experts)
    else:
        yield from _mlp(args, f"{prefix}.mlp", args.intermediate_size, "dense MLP")
    if layer.role == "mtp":
        yield _norm(f"{prefix}.shared_head.norm", hidden)


def _norm(path: str, size: int, bias: bool = False) -> Module:
    return Module(path, (size,), "norms", quantizable=False, bias=("bias", size) if bias else None)


def _attention(args: ModelArgs, prefix: str) -> Iterator[Module]:
    hidden, heads = args.hidden_size, args.num_attention_heads
    q_lora, kv_lora = args.q_lora_rank, args.kv_lora_rank

    def linear(
        name: str, rows: int, columns: int, biased: bool, shard: int | None, together: int | None
    ) -> Module:
        bias = ("bias", rows) if biased and args.attention_bias else None
        path, shape = f"{prefix}.{name}", (rows, columns)
        return Module(path, shape, "attention", bias=bias, shard=shard, together=together)

    yield linear("q_a_proj", q_lora, hidden, True, None, None)
    yield _norm(f"{prefix}.q_a_layernorm", q_lora)
    head = args.qk_head_dim
    yield linear("q_b_proj", heads * head, q_lora, False, 0, head)
    yield linear("kv_a_proj_with_mqa", kv_lora + args.qk_rope_head_dim, hidden, True, None, None)
    yield _norm(f"{prefix}.kv_a_layernorm", kv_lora)
    yield from _per_head(args, prefix)
    yield linear("o_proj", hidden, heads * args.v_head_dim, True, 0, None)


def _per_head(args: ModelArgs, prefix: str) -> Iterator[Module]:
    """``embed_q``, which is transposed, and ``unembed_out``; the release has both in one tensor."""
    heads, kv_lora = args.num_attention_heads, args.kv_lora_rank
    nope, v = args.qk_nope_head_dim, args.v_head_dim

    def module(name: str, shape: tuple[int, ...], first_row: int) -> Module:
        joined = (heads * (nope + v), kv_lora)
        form = Form(f"{prefix}.kv_b_proj", joined, first_row=first_row, kind="kv_b_proj")
        sign = f"{prefix}.embed_q.weight"  # the pair is stored in one form
        return Module(
            f"{prefix}.{name}", shape, name, shard=0, together=1, sign=sign, other_forms=(form,)
        )

    yield module("embed_q", (heads, kv_lora, nope), 0)
    yield module("unembed_out", (heads, v, kv_lora), nope)


def _indexer(args: ModelArgs, prefix: str) -> Iterator[Module]:
    heads, size = args.index_n_heads, args.index_head_dim

    def linear(name: str, rows: int, columns: int) -> Module:
        return Module(f"{prefix}.{name}", (rows, columns), "indexer", sensitive=True)

    yield linear("wq_b", heads * size, args.q_lora_rank)
    yield linear("wk", size, args.hidden_size)
    yield _norm(f"{prefix}.k_norm", size, bias=True)
    yield linear("weights_proj", heads, args.hidden_size)


def _mlp(args: ModelArgs, prefix: str, size: int, kind: str) -> Iterator[Module]:
    for name, shape in _projections(args, size).items():
        yield Module(f"{prefix}.{name}", shape, kind, shard=0)


def _moe(args: ModelArgs, prefix: str, experts: int) -> Iterator[Module]:
    yield Module(
        f"{prefix}.gate",
        (experts, args.hidden_size),
        "router",
        quantizable=False,
        sensitive=True,
        bias=("e_score_correction_bias", experts),
    )
    yield from _experts(args, prefix, experts)
    if args.n_shared_experts:
        size = args.moe_intermediate_size * args.n_shared_experts
        yield from _mlp(args, f"{prefix}.shared_experts", size, "shared experts")


def _experts(args: ModelArgs, prefix: str, experts: int) -> Iterator[Module]:
    """The routed experts: stacked, one tensor per expert, or stacked with gate and up in one."""
    size = args.moe_intermediate_size
    for name, (rows, columns) in _projections(args, size).items():
        single = Form(f"{prefix}.experts.{{}}.{name}", (rows, columns))
        joined = (experts, 2 * size, columns)
        if name == "down_proj":
            fused = Form(f"{prefix}.experts.{name}", (experts, rows, columns), "")
        else:
            path, first_row = f"{prefix}.experts.gate_up_proj", size if name == "up_proj" else 0
            fused = Form(path, joined, "", first_row=first_row, kind="experts gate, up")
        yield Module(
            f"{prefix}.switch_mlp.{name}",
            (experts, rows, columns),
            f"experts {name.removesuffix('_proj')}",
            experts=experts,
            shard=1,
            other_forms=(single, fused),
        )


def _projections(args: ModelArgs, size: int) -> dict[str, tuple[int, int]]:
    hidden = args.hidden_size
    return dict(zip(PROJECTIONS, ((size, hidden), (size, hidden), (hidden, size)), strict=True))


def expert_modules(args: ModelArgs, layer: LayerSpec) -> tuple[Module, ...]:
    """The stacked experts of a layer, gate, up and down; empty for a dense layer."""
    return tuple(module for module in layer_modules(args, layer) if module.experts)
