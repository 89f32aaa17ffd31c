"""Writes the slice of GLM-5.2 (glm52_slice.py) as GGUF files, for llama.cpp in bench_prompt.py.

    python bench/peers/llama_slice.py FOLDER --layers 3 --experts 16 --vocabulary 4096

The files are slice-BF16.gguf, slice-F16.gguf and slice-Q4_0.gguf, whose weights have the same
values; the indexer's are bfloat16 in the last. They have no vocabulary. It needs the package gguf;
llama_gguf.py says how to build llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
import glm52_slice
from glm52_slice import Slice

from glm_fused.host import to_numpy
from glm_fused.models.config import args_from_config
from glm_fused.models.tensors import Module, modules

TYPES = ("BF16", "F16", "Q4_0")
BLOCK = 32  # columns of Q4_0's, which have a float16 scale
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "self_attn.o_proj": "attn_output",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


class Tensor(NamedTuple):
    """A tensor of a file, by its name there; the module is whose weight it has, if not ones."""

    name: str
    shape: tuple[int, ...]
    kind: str
    module: Module | None = None

    def write(self, writer: GGUFWriter) -> None:
        """Write its values, which are made only now."""
        writer.write_tensor_data(self._values())

    def declare(self, writer: GGUFWriter) -> None:
        kind = GGMLQuantizationType[self.kind]
        size = int(np.prod(self.shape)) * 18 // BLOCK if self.kind == "Q4_0" else 0
        size = size or int(np.prod(self.shape)) * (4 if self.kind == "F32" else 2)
        writer.add_tensor_info(self.name, self.shape, np.dtype(np.float32), size, kind)

    def _values(self) -> NDArray[Any]:
        if self.module is None:
            filled = 0 if self.name.endswith(".bias") else 1
            return np.full(self.shape, filled, np.float32)
        path = self.module.path
        if self.kind == "F32":
            import mlx.core as mx

            return to_numpy(glm52_slice.router(path, self.shape).astype(mx.float32))
        packed = glm52_slice.packed_codes(path, self.shape)
        scale = glm52_slice.scale(self.shape)
        return q4_0(packed, scale) if self.kind == "Q4_0" else floats(packed, scale, self.kind)


def q4_0(packed: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Blocks of Q4_0 [..., k / 32 * 18] of nibbles [..., k / 2]."""
    pairs = packed.reshape(*packed.shape[:-1], -1, BLOCK // 2)
    codes = glm52_slice.codes_of(pairs)
    blocks = np.empty((*pairs.shape[:-1], 18), np.uint8)
    blocks[..., :2] = np.full(1, scale, np.float16).view(np.uint8)
    blocks[..., 2:] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return blocks.reshape(*packed.shape[:-1], -1)


def floats(packed: NDArray[np.uint8], scale: float, kind: str) -> NDArray[np.uint16]:
    """The bits of the values [..., k] of nibbles [..., k / 2], as BF16 or F16."""
    values = (np.arange(16, dtype=np.float32) - glm52_slice.ZERO) * np.float32(scale)
    bits = values.view(np.uint32) >> 16 if kind == "BF16" else values.astype("f2").view("u2")
    return np.take(bits.astype(np.uint16), glm52_slice.codes_of(packed))


def tensors(of: Slice, kind: str) -> Iterator[Tensor]:
    """The tensors of a file whose matrices have the type ``kind``."""
    for module in modules(args_from_config(of.config())):
        stem = name(module.path)
        if module.path.endswith("mlp.gate"):
            yield Tensor(f"{stem}.weight", module.shape, "F32", module)
            yield Tensor(stem.replace("ffn_gate_inp", "exp_probs_b.bias"), module.shape[:1], "F32")
        elif len(module.shape) == 1:
            yield Tensor(f"{stem}.weight", module.shape, "F32")
            if module.bias is not None:
                yield Tensor(f"{stem}.bias", module.shape, "F32")
        else:
            own = "BF16" if module.sensitive and kind == "Q4_0" else kind
            yield Tensor(f"{stem}.weight", module.shape, own, module)


def name(path: str) -> str:
    """llama.cpp's name of a module."""
    if path in NAMES:
        return NAMES[path]
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def add_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """What llama.cpp wants to know of the model, as its converter writes it."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])
    full = [kind == "full" for kind in config["indexer_types"]]
    writer.add_array("glm-dsa.attention.indexer.types", full)


def write(of: Slice, kind: str, file: Path) -> None:
    """Write the slice with matrices of the type ``kind``, one tensor after the other."""
    writer = GGUFWriter(file, "glm-dsa")
    add_metadata(writer, of.config())
    held = list(tensors(of, kind))
    for tensor in held:
        tensor.declare(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in held:
        tensor.write(writer)
    writer.close()


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    glm52_slice.add_options(parser)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write to")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for kind in options.types:
        file = options.folder / f"slice-{kind}.gguf"
        write(glm52_slice.chosen(options), kind, file)
        print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
