"""The cases, each a release-style config.json and a pair of seeds for weights and tokens."""

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One golden model. ``token_seed`` was found with ``make_vectors.py --search``."""

    name: str
    config: Config
    weight_seed: int
    token_seed: int
    length: int = 208
    bias_mean: float = 0.0
    batch_lengths: tuple[int, ...] = ()

    @property
    def mtp(self) -> bool:
        return bool(self.config["num_nextn_predict_layers"])

    @property
    def fp8(self) -> bool:
        return "quantization_config" in self.config


SPECIAL = {"eos_token_id": [93, 94, 95], "pad_token_id": 93}
N_TEXT_TOKENS = 93  # prompts use ids below the special tokens


# The releases of both families say this, except for the tiny vocabulary.
RELEASE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 96,
}


def _config(**values: Any) -> Config:
    return dict(sorted((RELEASE | values).items()))


def _glm(**sizes: Any) -> Config:
    """What every GLM-5 release says, with tiny sizes."""
    base = {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "dtype": "float32",
        "model_type": "glm_moe_dsa",
        "n_group": 1,
        "num_key_value_heads": sizes["num_attention_heads"],
        "pretraining_tp": 1,
        "qk_head_dim": sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"],
        "rms_norm_eps": 1e-05,
        "rope_interleave": True,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "5.15.0",
    }
    return _config(**(base | SPECIAL | sizes))


def _glm52(**sizes: Any) -> Config:
    """The keys that 5.2 adds: head_dim is the nope width, RoPE stays qk_rope_head_dim wide."""
    added = {
        "head_dim": sizes["qk_nope_head_dim"],
        "index_share_for_mtp_iteration": True,
        "indexer_rope_interleave": True,
        "max_position_embeddings": 1048576,
        "moe_router_dtype": "float32",
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    }
    return _glm(**(added | sizes))


GLM51 = _glm(
    first_k_dense_replace=3,
    head_dim=8,
    hidden_size=64,
    index_head_dim=16,
    index_n_heads=8,
    index_topk=32,
    indexer_rope_interleave=True,
    intermediate_size=64,
    kv_lora_rank=32,
    max_position_embeddings=202752,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_attention_heads=2,
    num_experts_per_tok=2,
    num_hidden_layers=4,
    q_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=8,
    rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
    v_head_dim=32,
)

GLM52 = _glm52(
    first_k_dense_replace=3,
    hidden_size=32,
    index_head_dim=12,
    index_n_heads=8,
    index_skip_topk_offset=3,
    index_topk=24,
    index_topk_freq=4,
    index_topk_pattern=None,
    indexer_types=["full", "full", "full", "shared", "shared", "shared", "full", "shared"],
    intermediate_size=48,
    kv_lora_rank=24,
    mlp_layer_types=["dense"] * 3 + ["sparse"] * 5,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_attention_heads=4,
    num_experts_per_tok=2,
    num_hidden_layers=8,
    q_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
)

# The pattern outranks freq/offset, which are left at their 5.2 values and disagree with it.
GLM_PATTERN = _glm52(
    first_k_dense_replace=2,
    hidden_size=40,
    index_head_dim=12,
    index_n_heads=8,
    index_skip_topk_offset=3,
    index_topk=24,
    index_topk_freq=4,
    index_topk_pattern="FSSFSF",
    intermediate_size=48,
    kv_lora_rank=20,
    moe_intermediate_size=16,
    n_routed_experts=10,
    num_attention_heads=2,
    num_experts_per_tok=3,
    num_hidden_layers=6,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
)

DEEPSEEK_V32 = _config(
    architectures=["DeepseekV32ForCausalLM"],
    bos_token_id=0,
    eos_token_id=1,
    first_k_dense_replace=2,
    hidden_size=32,
    index_head_dim=24,
    index_n_heads=8,
    index_topk=40,
    intermediate_size=48,
    kv_lora_rank=24,
    max_position_embeddings=2560,
    model_type="deepseek_v32",
    moe_intermediate_size=16,
    n_group=4,
    n_routed_experts=16,
    num_attention_heads=2,
    num_experts_per_tok=4,
    num_hidden_layers=4,
    num_key_value_heads=2,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    rms_norm_eps=1e-06,
    rope_scaling={
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    rope_theta=10000,
    topk_group=2,
    topk_method="noaux_tc",
    torch_dtype="float32",
    transformers_version="4.44.2",
    v_head_dim=16,
)

_ODD_SIZES = _glm52(
    first_k_dense_replace=3,
    hidden_size=96,
    index_head_dim=12,
    index_n_heads=7,
    index_skip_topk_offset=2,
    index_topk=27,
    index_topk_freq=2,
    intermediate_size=24,
    kv_lora_rank=28,
    moe_intermediate_size=160,
    n_routed_experts=3,
    num_attention_heads=3,
    num_experts_per_tok=2,
    num_hidden_layers=4,
    q_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=12,
)
# This is as transformers saves it, without the keys that its config class does not know.
_UNKNOWN = ("ep_size", "moe_layer_freq", "scoring_func", "topk_method", "pretraining_tp")
ODD_SIZES = {key: value for key, value in _ODD_SIZES.items() if key not in _UNKNOWN}

FP8 = _glm52(
    dtype="bfloat16",
    first_k_dense_replace=2,
    hidden_size=144,
    index_head_dim=24,
    index_n_heads=8,
    index_skip_topk_offset=3,
    index_topk=32,
    index_topk_freq=4,
    index_topk_pattern=None,
    indexer_types=["full", "full", "full", "shared"],
    intermediate_size=136,
    kv_lora_rank=40,
    mlp_layer_types=["dense"] * 2 + ["sparse"] * 2,
    moe_intermediate_size=24,
    n_routed_experts=5,
    num_attention_heads=3,
    num_experts_per_tok=2,
    num_hidden_layers=4,
    q_lora_rank=40,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    quantization_config={
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    v_head_dim=48,
)

# An MTP layer, which has an indexer of its own, after a shared layer.
GLM52_MTP = _glm52(
    first_k_dense_replace=1,
    hidden_size=32,
    index_head_dim=12,
    index_n_heads=8,
    index_skip_topk_offset=3,
    index_topk=24,
    index_topk_freq=4,
    index_topk_pattern=None,
    indexer_types=["full", "shared"],
    intermediate_size=48,
    kv_lora_rank=24,
    mlp_layer_types=["dense", "sparse"],
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_attention_heads=4,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    q_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
)

CASES = {
    case.name: case
    for case in (
        Case("glm51", GLM51, weight_seed=51, token_seed=71),
        Case("glm52", GLM52, weight_seed=52, token_seed=393, batch_lengths=(60, 97, 130)),
        Case("glm52_mtp", GLM52_MTP, weight_seed=57, token_seed=191),
        Case("glm_pattern", GLM_PATTERN, weight_seed=53, token_seed=229),
        # Most biased scores are negative, so rejected groups must be -inf: a zero would win.
        Case("deepseek_v32", DEEPSEEK_V32, weight_seed=32, token_seed=744, bias_mean=-0.5),
        Case("odd_sizes", ODD_SIZES, weight_seed=55, token_seed=167),
        Case("fp8", FP8, weight_seed=8, token_seed=428),
    )
}
