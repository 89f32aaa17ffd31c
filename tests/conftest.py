"""Makes tiny GLM-5 checkpoints in every layout, without the package's own code, and what tests
share of a session: the bundled model, and a server of it."""

import json
import os
import random
import re
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

# No test asks the Hugging Face Hub; those that ask one have it on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"

PROCESSORS = os.cpu_count() or 1
# Of test processes side by side each has its share of the processors: threads that wait for one
# another spin, and there would be more of them than processors.
_BESIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _BESIDE > 1:
    os.environ.setdefault("GLM_FUSED_NUM_THREADS", str(max(1, PROCESSORS // _BESIDE)))

# These ask the simulator itself; the other Metal tests run on a Mac's GPU.
_SIMULATOR = ("test_sim_*", "test_metal_moe_decode*", "test_metal_router*", "test_metal_mutations*")
collect_ignore_glob = [] if sys.platform == "linux" else [*_SIMULATOR]

TINY = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 16,
    "indexer_types": ["full", "full", "shared", "full", "shared"],
    "index_topk_freq": 2,
    "index_skip_topk_offset": 2,
    "index_share_for_mtp_iteration": True,
    "indexer_rope_interleave": True,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 8000000.0, "rope_type": "default"},
    "num_nextn_predict_layers": 1,
    "eos_token_id": [250, 251],
    "pad_token_id": 250,
}
DEVICES = ["cpu", "gpu"] if mx.metal.is_available() else ["cpu"]
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
_NAMES = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
}
_FP8_DENSE = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj", "eh_proj")
_INDEX_SCHEDULE = (
    "indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_share_for_mtp_iteration",
)  # fmt: skip


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    """Run the test with each device as MLX's default: the CPU, and on a Mac its GPU too."""
    before = mx.default_device()
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(before)


@pytest.fixture(scope="session")
def engine():
    """The bundled model, which no test changes."""
    from glm_fused import Engine

    with Engine("demo") as engine:
        yield engine


@pytest.fixture(scope="session")
def server(engine):
    """A server of the bundled model, as it is unless a setting says otherwise."""
    from served import served

    with served(engine) as server:
        yield server


@pytest.fixture(scope="session")
def loaded():
    """The bundled model with its MTP layer, without an engine; see `model`."""
    import glm_fused

    return glm_fused.load_model("demo", mtp=True)[0]


@pytest.fixture
def model(loaded):
    """The bundled model with its MTP layer, of which a test may change the format of caches."""
    loaded.kv_format = "auto"
    return loaded


@pytest.fixture
def rng():
    """A generator whose seed is printed where a test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def several_threads():
    """Kernels share out their work among threads, also where test processes run side by side."""
    from glm_fused import num_threads, set_num_threads

    before = num_threads()
    set_num_threads(max(2, PROCESSORS))
    yield
    set_num_threads(before)


def tiny_config(**overrides):
    """A small 5.2-style config; a value of None removes the key."""
    config = json.loads(json.dumps(TINY)) | overrides
    return {k: v for k, v in config.items() if v is not None}


def tiny_config_51(**overrides):
    """A small 5 / 5.1-style config; it has no schedule, so every layer runs its indexer."""
    return tiny_config(**dict.fromkeys(_INDEX_SCHEDULE), **overrides)


def write_safetensors(path, tensors, metadata=None):
    """Write `{name: array or (dtype name, shape, bytes)}` in the order given."""
    header = {"__metadata__": metadata or {"format": "mlx"}}
    blobs, offset = [], 0
    for name, tensor in tensors.items():
        dtype, shape, blob = tensor if isinstance(tensor, tuple) else _raw(tensor)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            f.write(blob)


def _raw(array):
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return _NAMES[array.dtype], array.shape, np.array(bits).tobytes()


def write_checkpoint(
    directory,
    config=None,
    *,
    layout="mlx",
    quantization=None,
    dtype="bfloat16",
    shards=1,
    seed=0,
    mtp=False,
    shared_indexers=False,
    edit=None,
):
    """Write a checkpoint of random weights; the same seed gives the same values in every layout.

    `layout` is "hf" (a tensor per expert, `kv_b_proj`), "hf-fused" (3-D `experts.gate_up_proj`),
    "fp8" (e4m3 with `weight_scale_inv`) or "mlx" (stacked experts, `embed_q`/`unembed_out`).
    `quantization`, for "hf" and "mlx", is the config entry `{group_size, bits, mode, <module path>:
    {...} | False}`. `edit(tensors)` may change the tensors before they are written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(config or tiny_config())
    tensors = make_tensors(config, layout, quantization, dtype, seed, mtp, shared_indexers)
    if quantization is not None:
        config["quantization"] = quantization
    if layout == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
        }
    if edit is not None:
        tensors = edit(tensors) or tensors
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _write_shards(directory, tensors, shards)
    return directory


def make_tensors(
    config,
    layout="mlx",
    quantization=None,
    dtype="bfloat16",
    seed=0,
    mtp=False,
    shared_indexers=False,
):
    """The tensors that `write_checkpoint` writes, as `{name: mx.array or raw triple}`."""
    tensors = hf_tensors(config, DTYPES[dtype], seed, mtp, shared_indexers)
    if layout == "hf-fused":
        tensors = _fuse_experts(config, tensors)
    elif layout == "fp8":
        return _to_fp8(tensors)
    elif layout == "mlx":
        tensors = _to_mlx(config, tensors)
    elif layout != "hf":
        raise ValueError(f"unknown layout {layout}")
    return _quantize(tensors, quantization) if quantization else tensors


def full_layers(config):
    """Whether each layer has an indexer, as a list."""
    types = config.get("indexer_types")
    return [types is None or types[i] == "full" for i in range(config["num_hidden_layers"])]


def hf_tensors(config, dtype, seed=0, mtp=False, shared_indexers=False):
    """Random weights under HF's names."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape, scale=None, offset=0.0, to=dtype):
        scale = shape[-1] ** -0.5 if scale is None else scale
        values = rng.standard_normal(shape, dtype=np.float32) * scale + offset
        tensors[name] = mx.array(values).astype(to)

    def norm(name, size):
        add(f"{name}.weight", size, scale=0.1, offset=1.0)

    hidden, n_layers = config["hidden_size"], config["num_hidden_layers"]
    add("model.embed_tokens.weight", config["vocab_size"], hidden, scale=1.0)
    for i, full in enumerate(full_layers(config)):
        _layer(config, i, full or shared_indexers, tensors, add, norm)
    norm("model.norm", hidden)
    add("lm_head.weight", config["vocab_size"], hidden)
    if mtp:
        layer = f"model.layers.{n_layers}"
        _layer(config, n_layers, True, tensors, add, norm)
        add(f"{layer}.eh_proj.weight", hidden, 2 * hidden)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm(f"{layer}.{name}", hidden)
    return tensors


def _layer(config, i, full, tensors, add, norm):
    layer, hidden = f"model.layers.{i}", config["hidden_size"]

    def mlp(prefix, size):
        add(f"{prefix}.gate_proj.weight", size, hidden)
        add(f"{prefix}.up_proj.weight", size, hidden)
        add(f"{prefix}.down_proj.weight", hidden, size)

    # The indexer is always drawn, so that the other weights do not depend on the schedule.
    _attention(config, f"{layer}.self_attn", add, norm)
    if not full:
        for name in [k for k in tensors if k.startswith(f"{layer}.self_attn.indexer.")]:
            del tensors[name]
    norm(f"{layer}.input_layernorm", hidden)
    norm(f"{layer}.post_attention_layernorm", hidden)
    if i < config["first_k_dense_replace"]:
        mlp(f"{layer}.mlp", config["intermediate_size"])
        return
    size, n_experts = config["moe_intermediate_size"], config["n_routed_experts"]
    add(f"{layer}.mlp.gate.weight", n_experts, hidden)
    bias = f"{layer}.mlp.gate.e_score_correction_bias"
    add(bias, n_experts, scale=0.05, to=mx.float32)
    if config["n_shared_experts"]:
        mlp(f"{layer}.mlp.shared_experts", size * config["n_shared_experts"])
    for e in range(n_experts):
        mlp(f"{layer}.mlp.experts.{e}", size)


def _attention(config, prefix, add, norm):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, v = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    add(f"{prefix}.q_a_proj.weight", q_lora, hidden)
    norm(f"{prefix}.q_a_layernorm", q_lora)
    add(f"{prefix}.q_b_proj.weight", heads * (nope + rope), q_lora)
    add(f"{prefix}.kv_a_proj_with_mqa.weight", kv_lora + rope, hidden)
    norm(f"{prefix}.kv_a_layernorm", kv_lora)
    add(f"{prefix}.kv_b_proj.weight", heads * (nope + v), kv_lora)
    add(f"{prefix}.o_proj.weight", hidden, heads * v)
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    add(f"{prefix}.indexer.wq_b.weight", index_heads * index_dim, q_lora)
    add(f"{prefix}.indexer.wk.weight", index_dim, hidden)
    norm(f"{prefix}.indexer.k_norm", index_dim)
    add(f"{prefix}.indexer.k_norm.bias", index_dim, scale=0.1)
    add(f"{prefix}.indexer.weights_proj.weight", index_heads, hidden)


def _take_experts(config, tensors, prefix, projection):
    names = [f"{prefix}.experts.{e}.{projection}.weight" for e in range(config["n_routed_experts"])]
    return mx.stack([tensors.pop(name) for name in names])


def _expert_prefixes(tensors):
    return [k.removesuffix(".experts.0.up_proj.weight") for k in tensors if ".experts.0.up" in k]


def _fuse_experts(config, tensors):
    for prefix in _expert_prefixes(tensors):
        gate, up, down = (
            _take_experts(config, tensors, prefix, p) for p in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{prefix}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        tensors[f"{prefix}.experts.down_proj"] = down
    return tensors


def _to_mlx(config, tensors):
    for prefix in _expert_prefixes(tensors):
        for p in ("gate_proj", "up_proj", "down_proj"):
            stacked = _take_experts(config, tensors, prefix, p)
            tensors[f"{prefix}.switch_mlp.{p}.weight"] = stacked
    nope, heads = config["qk_nope_head_dim"], config["num_attention_heads"]
    for name in [k for k in tensors if k.endswith("kv_b_proj.weight")]:
        w = tensors.pop(name).reshape(heads, nope + config["v_head_dim"], config["kv_lora_rank"])
        prefix = name.removesuffix("kv_b_proj.weight")
        tensors[f"{prefix}embed_q.weight"] = mx.contiguous(w[:, :nope].swapaxes(-1, -2))
        tensors[f"{prefix}unembed_out.weight"] = mx.contiguous(w[:, nope:])
    return tensors


def _setting(quantization, module):
    """The entry for a module: its own, else its form's in the other layout, else the top one."""
    source = module.replace("unembed_out", "kv_b_proj").replace("embed_q", "kv_b_proj")
    expert = source.replace("switch_mlp", "experts.0")
    stack = re.sub(r"experts\.\d+", "switch_mlp", module)
    for key in (module, source, expert, stack):
        if key in quantization:
            return quantization[key]
    return {k: v for k, v in quantization.items() if k in ("group_size", "bits", "mode")}


def _quantize(tensors, quantization):
    out = {}
    for name, w in tensors.items():
        module = name.removesuffix(".weight")
        dense = w.ndim < 2 or name.endswith(("mlp.gate.weight", "weights_proj.weight"))
        setting = False if dense or module == name else _setting(quantization, module)
        if setting is False or w.shape[-1] % setting["group_size"]:
            out[name] = w
            continue
        out[name], out[f"{module}.scales"], *biases = mx.quantize(w, **setting)
        if biases:
            out[f"{module}.biases"] = biases[0]
    return out


def _to_fp8(tensors):
    out = {}
    for name, w in tensors.items():
        if w.ndim < 2 or any(part in name for part in _FP8_DENSE):
            out[name] = w
            continue
        (m, n), values = w.shape, np.array(w.astype(mx.float32))
        blocks = np.pad(values, ((0, -m % 128), (0, -n % 128)))
        blocks = blocks.reshape(-(-m // 128), 128, -(-n // 128), 128)
        scale = np.abs(blocks).max(axis=(1, 3)) / 448.0
        rows, columns = np.arange(m) // 128, np.arange(n) // 128
        codes = mx.to_fp8(mx.array(values / scale[rows][:, columns]))
        out[name] = ("F8_E4M3", (m, n), np.array(codes).tobytes())
        out[f"{name}_scale_inv"] = mx.array(scale)
    return out


def _write_shards(directory, tensors, shards):
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(directory / file, {k: tensors[k] for k in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(f.stat().st_size for f in directory.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(**arguments of write_checkpoint)` writes one into the test's own folder."""

    def make(config=None, **kwargs):
        return write_checkpoint(tmp_path / "checkpoint", config, **kwargs)

    return make


@pytest.fixture
def taken(monkeypatch):
    """Of how many texts each chunk of prompts is, and how many tokens of each it has."""
    from glm_fused.generation.batching.filling import Filling

    found, take = [], Filling.take

    def note(self, most):
        before = self.left
        count = take(self, most)
        found.append((len(self.rows), before - self.left))
        return count

    monkeypatch.setattr(Filling, "take", note)
    return found
