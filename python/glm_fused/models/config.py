"""Model configuration of ``glm_moe_dsa`` and ``deepseek_v32``, resolved per layer and checked."""

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from mlx_lm.models.base import BaseModelArgs

from .. import validation as check
from .layer_spec import SPARSE, LayerSpec, indexer_types, layer_specs, mlp_types
from .rope import RopeParameters

MAX_LAYERS = 1024  # bounds the work that a corrupt config can cause
LEAST = 1e-20  # the least that may divide or scale; far smaller numbers are 0 in float32

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "moe_layer_freq",
    "max_position_embeddings",
)
FLAGS = (
    "norm_topk_prob",
    "attention_bias",
    "tie_word_embeddings",
    "indexer_rope_interleave",
    "index_share_for_mtp_iteration",
)


@dataclass
class ModelArgs(BaseModelArgs):
    """A GLM-5 config; keys and defaults are transformers'.

    After construction ``layers`` describes every layer of the decoder and ``mtp_layers`` those that
    predict further tokens, whichever keys they came from; ``indexer_types`` and ``mlp_layer_types``
    name every decoder layer, and ``rope`` holds the rope parameters of either spelling. A model has
    ``model_layers``: those of the decoder and, of args that `with_mtp` made, the first of MTP.
    ``num_key_value_heads`` is accepted and unused: MLA caches one latent for all heads.
    """

    model_type: str = "glm_moe_dsa"
    vocab_size: int = 154880
    hidden_size: int = 6144
    intermediate_size: int = 12288
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 78
    num_attention_heads: int = 64
    num_key_value_heads: int = 64
    q_lora_rank: int = 2048
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 192
    qk_rope_head_dim: int = 64
    v_head_dim: int = 256
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 2048
    indexer_rope_interleave: bool = True
    indexer_types: list[str] | None = None
    index_topk_pattern: str | list[str] | None = None
    index_topk_freq: int | None = None
    index_skip_topk_offset: int | None = None
    n_routed_experts: int | None = 256
    num_routed_experts_per_layer: list[int] | None = None
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    mlp_layer_types: list[str] | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 202752
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    index_share_for_mtp_iteration: bool = False
    has_mtp: bool = field(init=False, repr=False, default=False)
    rope: RopeParameters = field(init=False, repr=False)
    layers: tuple[LayerSpec, ...] = field(init=False, repr=False)
    mtp_layers: tuple[LayerSpec, ...] = field(init=False, repr=False)

    @classmethod
    def from_dict(cls, params: Any) -> "ModelArgs":
        """Build from a parsed config.json; unknown keys are ignored, missing ones get defaults.

        Raises ValueError for anything that is not a possible config.
        """
        params = dict(check.mapping("config.json", params))
        for alias in ("num_experts", "num_local_experts"):
            if alias in params:
                params.setdefault("n_routed_experts", params[alias])
        counts = params.get("num_routed_experts_per_layer")
        if isinstance(counts, list) and all(type(count) is int for count in counts) and counts:
            params.setdefault("n_routed_experts", max(counts))
        names = {f.name for f in fields(cls) if f.init}
        return cls(**{key: value for key, value in params.items() if key in names})

    def __post_init__(self) -> None:
        self._check_scalars()
        self._check_attention()
        self.mlp_layer_types = mlp_types(self)
        if SPARSE in self.mlp_layer_types and self.n_routed_experts is None:
            check.fail("n_routed_experts", "an integer where mlp_layer_types has 'sparse'", None)
        self.indexer_types = indexer_types(self)
        self.layers, self.mtp_layers = layer_specs(self)
        self._check_layers(self.layers)
        self.rope = RopeParameters.from_config(
            self.rope_parameters, self.rope_theta, self.rope_scaling, self.max_position_embeddings
        )

    def with_mtp(self) -> "ModelArgs":
        """The args of the same model with the layer that predicts one token more.

        Raises ValueError where the config has no such layer.
        """
        if not self.mtp_layers:
            expected = "at least 1, as drafts need an MTP layer"
            check.fail("num_nextn_predict_layers", expected, self.num_nextn_predict_layers)
        args = copy(self)
        args.has_mtp = True
        args._check_layers(args.model_layers)
        return args

    @property
    def model_layers(self) -> tuple[LayerSpec, ...]:
        """All layers that a model of these args has."""
        return self.layers + self.mtp_layers[: int(self.has_mtp)]

    @property
    def qk_head_dim(self) -> int:
        """The width of a head's queries and keys, its RoPE part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def _check_scalars(self) -> None:
        check.choice("model_type", self.model_type, type(self).model_type)
        for key in SIZES:
            check.integer(key, getattr(self, key))
        check.integer("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        check.integer("first_k_dense_replace", self.first_k_dense_replace, 0)
        check.integer("num_nextn_predict_layers", self.num_nextn_predict_layers, 0, MAX_LAYERS)
        for key in FLAGS:
            check.boolean(key, getattr(self, key))
        self.rms_norm_eps = check.number("rms_norm_eps", self.rms_norm_eps, LEAST, 1.0)
        scaling = check.number("routed_scaling_factor", self.routed_scaling_factor, LEAST, 1e6)
        self.routed_scaling_factor = scaling
        check.choice("hidden_act", self.hidden_act, "silu")
        check.choice("scoring_func", self.scoring_func, "sigmoid")
        check.choice("topk_method", self.topk_method, "noaux_tc")
        if self.n_shared_experts is not None:
            check.integer("n_shared_experts", self.n_shared_experts, 0)
        if self.n_routed_experts is not None:
            check.integer("n_routed_experts", self.n_routed_experts)

    def _check_attention(self) -> None:
        if self.qk_rope_head_dim % 2:
            check.fail("qk_rope_head_dim", "even", self.qk_rope_head_dim)
        if self.index_head_dim < self.qk_rope_head_dim:
            expected = f"at least qk_rope_head_dim ({self.qk_rope_head_dim})"
            check.fail("index_head_dim", expected, self.index_head_dim)
        per_head = max(self.qk_head_dim, self.qk_nope_head_dim + self.v_head_dim)
        check.product("num_attention_heads * head size", a=self.num_attention_heads, b=per_head)
        check.product("index_n_heads * index_head_dim", a=self.index_n_heads, b=self.index_head_dim)

    def _check_layers(self, layers: tuple[LayerSpec, ...]) -> None:
        for experts in sorted({spec.experts for spec in layers if spec.is_sparse}):
            self._check_experts(experts)

    def _check_experts(self, experts: int) -> None:
        """Check that a layer of so many experts can be routed to."""
        groups = self.n_group
        per_layer = self.num_routed_experts_per_layer is not None
        key = "num_routed_experts_per_layer" if per_layer else "n_routed_experts"
        if experts % groups:
            check.fail("n_group", f"a divisor of {key} ({experts})", groups)
        if groups > 1 and experts // groups < 2:  # groups rank by their two best experts
            check.fail("n_group", f"at most {key} / 2 ({experts // 2})", groups)
        if self.topk_group > groups:
            check.fail("topk_group", f"at most n_group ({groups})", self.topk_group)
        selectable = experts // groups * self.topk_group
        if self.num_experts_per_tok > selectable:
            expected = f"at most the {selectable} selectable of {key} ({experts})"
            check.fail("num_experts_per_tok", expected, self.num_experts_per_tok)
        check.product(
            "n_shared_experts * moe_intermediate_size",
            a=self.n_shared_experts or 0,
            b=self.moe_intermediate_size,
        )


@dataclass
class DeepseekV32Args(ModelArgs):
    """A DeepSeek-V3.2 config: every layer full, half-split RoPE in the indexer."""

    model_type: str = "deepseek_v32"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int = 1536
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    index_n_heads: int = 64
    indexer_rope_interleave: bool = False
    n_group: int = 8
    topk_group: int = 4
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163840


ARGS_CLASSES = {"glm_moe_dsa": ModelArgs, "deepseek_v32": DeepseekV32Args}


def args_from_config(config: Any) -> ModelArgs:
    """The args of the class that ``config["model_type"]`` names."""
    model_type = check.mapping("config.json", config).get("model_type")
    return ARGS_CLASSES[check.choice("model_type", model_type, *ARGS_CLASSES)].from_dict(config)
