"""Changes of a config that no checkpoint of these tensors can mean."""

SIZES = [
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "n_routed_experts",
]
NOT_SIZES = [0, -1, 2.5, "128", [], {}, True, 2**31, 10**30, float("nan"), float("inf")]


def size_of_another_model(rng, config):
    key = rng.choice(SIZES)
    value = config[key] * 2 if rng.random() < 0.5 else config[key] + 2
    return {key: value}


def impossible_size(rng, config):
    return {rng.choice(SIZES): rng.choice(NOT_SIZES)}


def impossible_choice(rng, config):
    key = rng.choice(["model_type", "hidden_act", "scoring_func", "topk_method"])
    return {key: rng.choice(["", "llama", 3, None, ["sigmoid"], {}, "x" * 10_000])}


def impossible_experts(rng, config):
    return rng.choice(
        [
            {"num_experts_per_tok": 9},
            {"num_experts_per_tok": 0},
            {"n_group": 3},
            {"n_group": 4, "topk_group": 5},
            {"first_k_dense_replace": -1},
            {"first_k_dense_replace": 5},
            {"n_shared_experts": 2},
            {"n_shared_experts": "one"},
            {"routed_scaling_factor": float("nan")},
            {"moe_layer_freq": 0},
        ]
    )


def impossible_schedule(rng, config):
    types = list(config["indexer_types"])
    position = rng.randrange(len(types))
    choices = [
        types[:position],
        types + types[: position + 1],
        [*types[:position], rng.choice(["half", 1, None, [], "FULL"]), *types[position + 1 :]],
        ["shared", *types[1:]],
        ["full", "shared", "full", "full", "full"],
        "FFSFS",
        {"0": "full"},
    ]
    return {"indexer_types": rng.choice(choices)}


def impossible_quantization(rng, config):
    entry = {"group_size": 64, "bits": 4, "mode": "affine"}
    changes = [
        {"mode": rng.choice(["int4", "mxfp5", 4, None, [], "AFFINE"])},
        {"bits": rng.choice([0, 1, 7, 9, 16, -4, "4", 4.0, None, True, 10**40])},
        {"group_size": rng.choice([0, 1, 16, 48, 256, -64, "64", 64.0, 96, [64]])},
        {"mode": "mxfp4", "group_size": 32},
        {"mode": "nvfp4", "group_size": 16},
        {"bits": 8},
        {"group_size": 32},
        {"model.layers.0.self_attn.q_a_proj": rng.choice([False, {"bits": 8}, 4, "no", None])},
        {"lm_head": {"mode": "mxfp8"}},
    ]
    whole = [None, [], 4, "affine"]
    return {"quantization": rng.choice([entry | rng.choice(changes), rng.choice(whole)])}


def impossible_rope(rng, config):
    return {"rope_parameters": rng.choice([[], 7, {"rope_theta": 0}, {"rope_theta": "big"}])}


IMPOSSIBLE = [
    size_of_another_model,
    impossible_size,
    impossible_choice,
    impossible_experts,
    impossible_schedule,
    impossible_quantization,
    impossible_rope,
]
