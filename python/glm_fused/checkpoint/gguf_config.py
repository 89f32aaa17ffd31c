"""The config of a model, from the metadata of its GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import MAX_LAYERS
from ..validation import show
from .safetensors_header import TensorInfo

ARCHITECTURE = "glm-dsa"
METHOD = "gguf"  # of quantization: each tensor's type is its format
SIGMOID = 2
_LONG_CONTEXT = 1_048_576  # of the releases whose layers share selections
LOG_MULTIPLIER = 0.1  # yarn_log_multiplier is this times mscale_all_dim
# Keys of a config and their key in the metadata.
SIZES = {
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "v_head_dim": "attention.value_length_mla",
    "qk_rope_head_dim": "rope.dimension_count",
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "num_experts_per_tok": "expert_used_count",
}
STOP_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_from_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """The config that the release has for the model of a GGUF file, or of the first of its shards.

    ``tensors`` have the model's names.

    Raises ValueError, naming the file and the key with what was found and expected, for metadata of
    another architecture, keys that are missing, and values that no such model has.
    """
    return _Reader(path, metadata, tensors).config()


class _Reader:
    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]):
        self._path, self._metadata, self._tensors = path, metadata, tensors

    def config(self) -> dict[str, Any]:
        if (found := self._metadata.get("general.architecture")) != ARCHITECTURE:
            raise self._error("general.architecture", found, repr(ARCHITECTURE))
        mtp = self._integer("nextn_predict_layers", default=0)
        layers = self._integer("block_count") - mtp
        if not 1 <= layers <= MAX_LAYERS:
            expected = f"1 to {MAX_LAYERS} more than nextn_predict_layers ({mtp})"
            raise self._error(_full("block_count"), layers + mtp, expected)
        sizes = {key: self._integer(name) for key, name in SIZES.items()}
        head = self._integer("attention.key_length_mla")
        if head <= sizes["qk_rope_head_dim"]:
            expected = f"more than rope.dimension_count ({sizes['qk_rope_head_dim']})"
            raise self._error(_full("attention.key_length_mla"), head, expected)
        self._check_gating()
        indexers = self._indexer_types(layers, sizes["max_position_embeddings"])
        return sizes | {
            "model_type": "glm_moe_dsa",
            "architectures": ["GlmMoeDsaForCausalLM"],
            "num_hidden_layers": layers,
            "num_nextn_predict_layers": mtp,
            "vocab_size": self._vocabulary(),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_a_proj.bias" in self._tensors,
            "qk_nope_head_dim": head - sizes["qk_rope_head_dim"],
            "num_key_value_heads": sizes["num_attention_heads"],
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "routed_scaling_factor": self._number("expert_weights_scale"),
            "norm_topk_prob": self._flag("expert_weights_norm"),
            "n_group": self._integer("expert_group_count", default=1),
            "topk_group": self._integer("expert_group_used_count", default=1),
            "indexer_types": indexers,
            # No key says so, but releases whose layers share selections have drafts share them.
            "index_share_for_mtp_iteration": "shared" in indexers,
            "rope_parameters": self._rope(sizes["max_position_embeddings"]),
            "eos_token_id": self._stop_tokens(),
            "quantization_config": {"quant_method": METHOD},
        }

    def _error(self, key: str, found: object, expected: str) -> ValueError:
        found = "missing" if found is None else f"is {show(_plain(found))}"
        return ValueError(f"[gguf] {self._path}: key {key!r} {found}, expected {expected}.")

    def _value(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture; of an array of equal ones, one of them."""
        found = self._metadata.get(_full(name), default)
        if isinstance(found, np.ndarray) and found.size and (found == found[0]).all():
            return found[0].item()
        return found

    def _integer(self, name: str, default: int | None = None) -> int:
        found = self._value(name, default)
        if type(found) is not int or found < 0:
            raise self._error(_full(name), found, "a non-negative integer")
        return found

    def _number(self, name: str, default: float | None = None) -> float:
        found = self._value(name, default)
        if type(found) is not float:
            raise self._error(_full(name), found, "a float")
        # A float32 of a decimal is not the float64 of it, which configs have: 1e-5, say.
        return float(str(np.float32(found)))

    def _flag(self, name: str) -> bool:
        found = self._value(name)
        if type(found) is not bool:
            raise self._error(_full(name), found, "true or false")
        return found

    def _check_gating(self) -> None:
        found = self._integer("expert_gating_func", default=SIGMOID)
        if found != SIGMOID:
            raise self._error(_full("expert_gating_func"), found, f"{SIGMOID} (sigmoid)")

    def _vocabulary(self) -> int:
        """The key or, where it is missing, the rows of the embedding."""
        embedding = self._tensors.get("model.embed_tokens.weight")
        rows = embedding.shape[0] if embedding is not None else None
        return self._integer("vocab_size", default=rows)

    def _indexer_types(self, layers: int, context: int) -> list[str]:
        """Whether layers are full: as the key says or, in files without it, as releases are."""
        name = "attention.indexer.types"
        found = _plain(self._metadata.get(_full(name)))
        if found is None:
            shares = context >= _LONG_CONTEXT
            return ["shared" if shares and max(i - 2, 0) % 4 else "full" for i in range(layers)]
        known = isinstance(found, list) and all(type(x) in (bool, int) for x in found)
        if not known or len(found) < layers or not {int(x) for x in found} <= {0, 1}:
            raise self._error(_full(name), found, f"an array of {layers} booleans")
        return ["full" if is_full else "shared" for is_full in found[:layers]]

    def _rope(self, context: int) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": self._number("rope.freq_base")}
        kind = self._value("rope.scaling.type", "none")
        if kind == "yarn":
            return rope | self._yarn(context)
        if kind not in ("none", "linear"):
            raise self._error(_full("rope.scaling.type"), kind, "'none' or 'yarn'")
        self._expect_one("rope.scaling.factor")
        return rope | {"rope_type": "default"}

    def _yarn(self, context: int) -> dict[str, Any]:
        self._expect_one("rope.scaling.yarn_ext_factor")
        self._expect_one("rope.scaling.attn_factor")
        original = self._integer("rope.scaling.original_context_length", context)
        yarn = {
            "rope_type": "yarn",
            "factor": self._number("rope.scaling.factor"),
            "original_max_position_embeddings": original,
            "beta_fast": self._number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._number("rope.scaling.yarn_beta_slow", 1.0),
        }
        if (all_dim := self._number("rope.scaling.yarn_log_multiplier", 0.0)) != 0:
            # The file has no mscale, which is 1 in all configs that have both. Rounding takes away
            # what dividing a decimal leaves.
            yarn |= {"mscale": 1.0, "mscale_all_dim": round(all_dim / LOG_MULTIPLIER, 6)}
        if _full("rope.scaling.yarn_attn_factor") in self._metadata:
            yarn["attention_factor"] = self._number("rope.scaling.yarn_attn_factor")
        return yarn

    def _expect_one(self, name: str) -> None:
        """Raise ValueError where a key has another value than 1, with which it does nothing."""
        if (found := self._value(name, 1.0)) != 1:
            raise self._error(_full(name), found, "1.0")

    def _stop_tokens(self) -> list[int] | None:
        found = [self._metadata.get(f"tokenizer.ggml.{name}") for name in STOP_TOKENS]
        for name, token in zip(STOP_TOKENS, found, strict=True):
            if token is not None and (type(token) is not int or token < 0):
                raise self._error(f"tokenizer.ggml.{name}", token, "a token")
        return list(dict.fromkeys(token for token in found if token is not None)) or None


def _full(name: str) -> str:
    return f"{ARCHITECTURE}.{name}"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
