"""Corrupt configs, headers and files: an error each time, never a crash, a hang or a load."""

import json
import random
import signal
import struct
from contextlib import contextmanager

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint

from glm_fused.loader import load_model

SECONDS = 5  # a case takes milliseconds
CONFIG_CASES = 240
HEADER_CASES = 240
BYTE_CASES = 120
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


@contextmanager
def time_limit(seconds):
    """A hang becomes a failure, even inside a loop of Python."""

    def stop(*_):
        raise AssertionError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def assert_refused(path):
    before = mx.get_active_memory()
    with time_limit(SECONDS), pytest.raises((ValueError, OSError)) as error:
        load_model(path)
    assert len(str(error.value)) > 10
    assert len(str(error.value)) < 4000
    assert mx.get_active_memory() - before < 1 << 20  # refused before data was read


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A good checkpoint, its header and its data."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("fuzz"), quantization={"group_size": 64, "bits": 4}
    )
    load_model(path)
    content = (path / "model.safetensors").read_bytes()
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return path, content, json.loads(content[8:size]), content[size:]


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


CONFIG_MUTATIONS = [
    size_of_another_model,
    impossible_size,
    impossible_choice,
    impossible_experts,
    impossible_schedule,
    impossible_quantization,
    impossible_rope,
]


def write_config(path, rng, config, mutate):
    text = json.dumps(config | mutate(rng, config))
    (path / "config.json").write_text(text)


def linked(path, directory):
    """A folder with the checkpoint's weights, and room for another config."""
    (directory / "model.safetensors").symlink_to(path / "model.safetensors")
    return directory


@pytest.mark.parametrize("seed", range(CONFIG_CASES))
def test_mutated_config(pristine, tmp_path, seed):
    rng = random.Random(seed)
    config = tiny_config(quantization={"group_size": 64, "bits": 4})
    mutate = CONFIG_MUTATIONS[seed % len(CONFIG_MUTATIONS)]
    write_config(linked(pristine[0], tmp_path), rng, config, mutate)
    assert_refused(tmp_path)


def drop_tensor(rng, header, name):
    del header[name]


def rename_tensor(rng, header, name):
    cut = rng.randrange(len(name))
    header[name[:cut] + rng.choice("xü\0./") + name[cut:]] = header.pop(name)


def change_dtype(rng, header, name):
    dtypes = ["I8", "BF16", "F64", "U64", "Q4_K", "", "bf16", None, 4, []]
    header[name]["dtype"] = rng.choice([d for d in dtypes if d != header[name]["dtype"]])


def change_shape(rng, header, name):
    shape = header[name]["shape"]
    position = rng.randrange(len(shape))
    values = [0, -1, shape[position] + 1, 2**40, 2**80, 1.5, "8", None, [8], True]
    if shape[position] == 1:
        values.remove(True)  # equal to 1 in Python, but no number in JSON
    shape[position] = rng.choice(values)


def change_rank(rng, header, name):
    shape = header[name]["shape"]
    new = [shape[::-1], [*shape, 1], [1, *shape], [], None, {}, "8", [1] * 99 + shape]
    header[name]["shape"] = rng.choice([s for s in new if s != shape])


def change_offsets(rng, header, name):
    begin, end = header[name]["data_offsets"]
    values = [
        [begin + 2, end + 2],
        [begin - 2, end - 2],
        [begin, end - 2],
        [end, begin],
        [begin, 2**63],
        [-(2**70), end],
        [begin],
        [begin, end, end],
        [float(begin), end],
        None,
        "0,8",
    ]
    header[name]["data_offsets"] = rng.choice(values)


def change_entry(rng, header, name):
    header[name] = rng.choice([None, [], 7, {}, "x", header[name] | {"extra": 1}, [header[name]]])


def repeat_tensor(rng, header, name):
    header[f"{name}.copy"] = dict(header[name])


def swap_tensors(rng, header, name):
    others = [
        n for n in header if n != "__metadata__" and header[n]["shape"] != header[name]["shape"]
    ]
    other = rng.choice(others)
    header[name], header[other] = header[other], header[name]


def change_metadata(rng, header, name):
    header["__metadata__"] = rng.choice([7, [], {"a": 1}, {"a": None}, "x"])


HEADER_MUTATIONS = [
    drop_tensor,
    rename_tensor,
    change_dtype,
    change_shape,
    change_rank,
    change_offsets,
    change_entry,
    repeat_tensor,
    swap_tensors,
    change_metadata,
]


@pytest.mark.parametrize("seed", range(HEADER_CASES))
def test_mutated_header(pristine, tmp_path, seed):
    rng = random.Random(seed)
    path, _, header, data = pristine
    header = json.loads(json.dumps(header))
    name = rng.choice([n for n in header if n != "__metadata__"])
    HEADER_MUTATIONS[seed % len(HEADER_MUTATIONS)](rng, header, name)
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert_refused(tmp_path)


def corrupt(rng, content):
    """Truncate or extend the file, or damage the JSON of its header."""
    size = 8 + struct.unpack("<Q", content[:8])[0]
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content + bytes(rng.randrange(1, 100))
    if kind == 2:
        length = rng.choice([0, 1, size - 9, size - 7, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:]
    position = rng.randrange(8, size // 2)
    if kind == 3:
        return (
            content[:position] + bytes([rng.choice([0, 10, 0x80, 0xFF])]) + content[position + 1 :]
        )
    return content[:position] + content[position + 1 :]


@pytest.mark.parametrize("seed", range(BYTE_CASES))
def test_corrupt_file(pristine, tmp_path, seed):
    path, content, _, _ = pristine
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(corrupt(random.Random(seed), content))
    assert_refused(tmp_path)
