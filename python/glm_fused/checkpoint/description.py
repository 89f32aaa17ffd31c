"""What a checkpoint is and what a decoded token costs, from its headers alone."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from textwrap import wrap
from typing import Any

from ..formats.kv_rows import FLOATS
from ..formats.weights import Format
from ..models.cache import bytes_per_token
from ..models.config import DeepseekV32Args, ModelArgs
from ..models.prompt_memory import STEPS, PromptPlan, cache_bytes, chunk_bytes
from ..models.tensor_names import MTP_REASON
from ..models.tensors import Module, modules
from .checked import checked, has_whole_mtp
from .folder import Checkpoint
from .layer_contents import mtp_layers
from .layer_description import (
    IN_MEMORY,
    activity,
    decimal,
    describe_layers,
    format_layers,
    ranges,
    what_runs,
)
from .stored import Inventory, Stored

WIDTH = 100
RELEASED_EXPERTS = 256
PROMPT_TOKENS = 4096  # of the prompt whose memory is told


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`describe_checkpoint` of what ``path`` names; malformed headers raise as in loading."""
    return describe_checkpoint(Checkpoint.open(path))


def describe_checkpoint(
    checkpoint: Checkpoint, source: str = IN_MEMORY, slots: int | None = None
) -> dict[str, Any]:
    """A JSON-ready description of a checkpoint; reads no tensor data.

    ``source`` and ``slots`` are of routed experts, as `describe_layers` takes them.
    Raises what loading raises for tensors that do not fit the config.
    """
    args, inventory = checked(checkpoint)
    kinds = _by_kind(args, inventory)
    elsewhere = [t for t in checkpoint.tensors.values() if t.file not in checkpoint.files]
    return {
        "path": str(checkpoint.path),
        "model_type": args.model_type,
        "variant": variant(args),
        "parameters": sum(_elements(m) for m in modules(args)),
        "active_parameters": round(sum(_elements(m) * activity(args, m) for m in modules(args))),
        "files": len(checkpoint.files) + len({tensor.file for tensor in elsewhere}),
        "bytes_on_disk": sum(checkpoint.files.values()) + sum(t.nbytes for t in elsewhere),
        "bytes_loaded": sum(kind.loaded for kind in kinds.values()),
        "bytes_read_per_token": round(sum(kind.read for kind in kinds.values())),
        "kv_bytes_per_token": bytes_per_token(args),
        "prompt_memory": _prompt_plan(args, inventory).describe(),
        "formats": {name: kind.describe() for name, kind in kinds.items()},
        "layers": len(args.layers),
        "full_layers": ranges(layer.index for layer in args.layers if layer.is_full),
        "shared_layers": ranges(layer.index for layer in args.layers if not layer.is_full),
        "expert_layers": ranges(layer.index for layer in args.layers if layer.is_sparse),
        "experts": args.n_routed_experts,
        "experts_by_layer": [layer.experts for layer in args.layers],
        "experts_per_token": args.num_experts_per_tok,
        "index_topk": args.index_topk,
        "context_length": args.max_position_embeddings,
        "eos_token_id": checkpoint.config.get("eos_token_id"),
        "ignored_tensors": inventory.ignored,
        "mtp_layers": [asdict(layer) for layer in mtp_layers(args, checkpoint.tensors)],
        "drafts": _drafts(checkpoint, args, source, slots),
        "warnings": list(_warnings(inventory)),
        "each_layer": describe_layers(args, inventory, source, slots),
    }


def _drafts(
    checkpoint: Checkpoint, args: ModelArgs, source: str, slots: int | None
) -> dict[str, Any] | None:
    """What drafts of the MTP layer cost, where the checkpoint has all of it."""
    if not has_whole_mtp(checkpoint):
        return None
    with_it, inventory = checked(checkpoint, mtp=True)
    layer = describe_layers(with_it, inventory, source, slots)[-1]
    kinds = _by_kind(with_it, inventory)
    head = kinds["embedding" if args.tie_word_embeddings else "head"].read
    return layer | {
        "bytes_loaded": sum(kind.loaded for kind in kinds.values()),
        "bytes_read_per_draft": layer["bytes_read_per_token"] + round(head),
        "kv_bytes_per_token": bytes_per_token(with_it) - bytes_per_token(args),
        "prompt_memory": _prompt_plan(with_it, inventory).describe(),
    }


def _prompt_plan(args: ModelArgs, inventory: Inventory) -> PromptPlan:
    """What a prompt of `PROMPT_TOKENS` takes at most, with all weights in memory."""
    context, kv_format = min(PROMPT_TOKENS, args.max_position_embeddings), inventory.float_format
    float_bytes = FLOATS[kv_format].size
    return PromptPlan(
        STEPS[0],
        context,
        sum(stored.loaded for stored in inventory.stored),
        cache_bytes(args, context, kv_format),
        chunk_bytes(args, STEPS[0], context, float_bytes, streamed=False),
    )


def variant(args: ModelArgs) -> str:
    """The release that a config looks like."""
    if isinstance(args, DeepseekV32Args):
        name = "DeepSeek-V3.2"
    else:
        shared = not all(layer.is_full for layer in args.layers)
        name = "GLM-5.2/5.3" if shared else "GLM-5/5.1"
    counts = [layer.experts for layer in args.layers if layer.is_sparse]
    pruned = bool(counts) and min(counts) < RELEASED_EXPERTS
    if not pruned:
        return name
    return f"{name}, REAP-pruned to {_span(counts)} of {RELEASED_EXPERTS} experts"


@dataclass
class _Kind:
    """Totals of the weights of one kind."""

    formats: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    nbytes: int = 0
    loaded: int = 0
    read: float = 0.0

    def add(self, args: ModelArgs, stored: Stored) -> None:
        name = str(stored.format)
        module, size = stored.source.module, prod(stored.source.shape)
        self.formats[name] = self.formats.get(name, 0) + stored.nbytes
        self.weights += size + (module.bias[1] if module.bias else 0)
        self.nbytes += stored.nbytes
        self.loaded += stored.loaded
        self.read += stored.loaded * activity(args, module)

    def describe(self) -> dict[str, Any]:
        return {
            "formats": sorted(self.formats, key=lambda name: -self.formats[name]),
            "bits_per_weight": round(8 * self.nbytes / self.weights, 2),
            "weights": self.weights,
            "bytes": self.nbytes,
            "bytes_read_per_token": round(self.read),
        }


def _by_kind(args: ModelArgs, inventory: Inventory) -> dict[str, _Kind]:
    kinds: dict[str, _Kind] = {}
    for stored in inventory.stored:
        kinds.setdefault(stored.source.kind, _Kind()).add(args, stored)
    return kinds


def _warnings(inventory: Inventory) -> Iterator[str]:
    """What may make a checkpoint worse than its releases."""
    # FP8 blocks are how the model's makers release its indexers, too.
    found = [
        s
        for s in inventory.stored
        if s.source.kind == "indexer" and isinstance(s.format, Format) and s.format.mode != "dense"
    ]
    if found:
        formats = ", ".join(sorted({str(stored.format) for stored in found}))
        yield (
            f"the indexers are quantized ({formats}): models of this kind have lost what is"
            " thousands of tokens back; prefer a checkpoint whose indexers are bfloat16"
        )


def _span(counts: Sequence[int]) -> str:
    """ "160", or "96 to 160" for unlike numbers."""
    low, high = min(counts), max(counts)
    return str(high) if low == high else f"{low} to {high}"


def _elements(module: Module) -> int:
    return prod(module.shape) + (module.bias[1] if module.bias else 0)


def format_description(description: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    d = description
    lines = [
        f"{d['variant']} ({d['model_type']})",
        f"  path        {d['path']}",
        f"  parameters  {count(d['parameters'])}, {count(d['active_parameters'])} active a token",
        f"  on disk     {decimal(d['bytes_on_disk'])} in {_plural(d['files'], 'file')},"
        f" {decimal(d['bytes_loaded'])} loaded",
        f"  per token   {decimal(d['bytes_read_per_token'])} of weights read,"
        f" {d['kv_bytes_per_token']:,} B of cache (bfloat16)",
        _memory_line(d["prompt_memory"]),
        f"  layers      {d['layers']}",
        *_wrapped("full", d["full_layers"]),
        *_wrapped("shared", d["shared_layers"]),
        f"  experts     {_experts(d)}, {d['experts_per_token']} a token, on layers"
        f" {d['expert_layers'] or 'none'}",
        f"  context     {d['context_length']:,} tokens, {d['index_topk']} attended to",
        f"  eos         {d['eos_token_id']}",
    ]
    lines += [
        f"  unused      {n} tensors: {reason}"
        for reason, n in d["ignored_tensors"].items()
        if reason != MTP_REASON
    ]
    lines += [_mtp_line(layer) for layer in d["mtp_layers"]]
    lines += _draft_lines(d["drafts"]) if d["drafts"] else []
    for text in d["warnings"]:
        lines += wrap(text, WIDTH, initial_indent="  warning     ", subsequent_indent=" " * 14)
    lines += ["", f"  {'weights':<18}{'bits':>6}{'on disk':>11}{'a token':>11}  format"]
    for name, kind in d["formats"].items():
        lines.append(
            f"  {name:<18}{kind['bits_per_weight']:>6.2f}{decimal(kind['bytes']):>11}"
            f"{decimal(kind['bytes_read_per_token']):>11}  {', '.join(kind['formats'])}"
        )
    return "\n".join([*lines, "", *format_layers(d["each_layer"], WIDTH)])


def _experts(d: dict[str, Any]) -> str:
    counts = [count for count in d["experts_by_layer"] if count]
    return _span(counts) if counts else "none"


def _memory_line(plan: dict[str, int]) -> str:
    return (
        f"  memory      {decimal(plan['total'])} for a prompt of {plan['context']:,} tokens:"
        f" {decimal(plan['cache'])} of cache, {decimal(plan['temporaries'])} of temporaries"
    )


def _mtp_line(layer: dict[str, Any]) -> str:
    lacking = layer["missing"]
    lacks = f", lacks {_plural(len(lacking), 'weight')}" if lacking else ""
    size = f"{_plural(layer['tensors'], 'tensor')}, {decimal(layer['nbytes'])}"
    return f"  MTP layer   {layer['layer']}: {size}{lacks}; for drafts alone"


def _draft_lines(drafts: dict[str, Any]) -> list[str]:
    plan = drafts["prompt_memory"]
    return [
        f"  drafts      {decimal(drafts['bytes_read_per_draft'])} of weights read,"
        f" {drafts['kv_bytes_per_token']:,} B of cache a token (bfloat16)",
        f"              {decimal(plan['total'])} for that prompt then; {what_runs(drafts)}",
    ]


def _wrapped(label: str, text: str) -> list[str]:
    return wrap(
        text or "none", WIDTH, initial_indent=f"    {label:<10}", subsequent_indent=" " * 14
    )


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def count(n: int) -> str:
    """A number such as "744.1 G"."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
