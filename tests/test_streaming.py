"""Streamed models have the bits of resident ones, keep to a budget and raise clear errors."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_tensors, tiny_config, write_checkpoint
from test_generate import write_tokenizer
from test_slots import ROOT, build

from glm_fused import ops, reference_path
from glm_fused.generation.generate import generate
from glm_fused.generation.options import Options
from glm_fused.loader import load, load_model
from glm_fused.memory import parse_size
from glm_fused.ops import metal_sim
from glm_fused.streaming.experts import plan_waves
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack
from glm_fused.streaming.replay import TraceWriter, replay
from glm_fused.streaming.trace import read_trace

AFFINE = {"group_size": 32, "bits": 4}
PROMPT = mx.array([[3, 5, 7, 9, 11, 200, 31, 44, 50, 61]])
TOP_K = 2


def stream(slots=3, **kw):
    return StreamOptions(budget=8 << 30, slots=slots, patience=5.0, **kw)


def run(model, steps=8):
    """The bits of the logits after a prompt in two chunks and greedy steps that are built ahead."""
    cache, logits = model.make_cache(), []
    for chunk in (PROMPT[:, :6], PROMPT[:, 6:]):
        logits.append(model(chunk, cache))
        # mlx-lm does the same, which needs no experts of the last layer.
        mx.eval([c.state for c in cache])
    for _ in range(steps):
        token = mx.argmax(logits[-1][:, -1], axis=-1)[:, None]
        logits.append(model(token, cache))
        mx.async_eval(logits[-1])
    bits = {2: mx.uint16, 4: mx.uint32}[logits[0].dtype.size]
    return [np.array(step.view(bits)) for step in logits]


def same(a, b):
    return len(a) == len(b) and all((x == y).all() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed")
    write_checkpoint(path, tiny_config(), quantization=AFFINE, shards=3)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def sidecar(folder):
    pack(folder, folder / "sidecar")
    return folder / "sidecar"


@pytest.fixture(scope="module")
def resident(folder):
    return run(load_model(folder)[0])


@pytest.mark.parametrize("packed", [False, True], ids=["shards", "sidecar"])
@pytest.mark.parametrize("policy", ["learned", "lru", "s3fifo", "pinned"])
@pytest.mark.parametrize("slots", [2, 3, 5, 8])
def test_every_bank_gives_the_bits_of_the_resident_model(
    folder, sidecar, resident, slots, policy, packed
):
    pins = {layer: list(range(min(2, slots - TOP_K))) for layer in range(1, 5)}
    options = stream(slots, policy=policy, pins=pins, sidecar=sidecar if packed else None)
    model, _ = load_model(folder, stream=options)
    assert same(run(model), resident)
    stats = model.streaming.stats()
    assert stats["misses"] >= 4 * TOP_K
    assert model.streaming.plan.slots == slots


@pytest.mark.parametrize("slots", [3, 4, 6, 8])
def test_lookahead_changes_no_bits(folder, resident, slots):
    model, _ = load_model(folder, stream=stream(slots, spares=1))
    assert same(run(model), resident)
    assert model.streaming.stats()["prefetches"] > 0


@pytest.mark.parametrize("split", [4096, 1 << 20])
@pytest.mark.parametrize("depth", [1, 5])
def test_reads_past_the_page_cache(folder, sidecar, resident, depth, split):
    for source in (None, sidecar):
        options = stream(sidecar=source, direct=True, depth=depth, split=split)
        assert same(run(load_model(folder, stream=options)[0]), resident)


def test_the_reference_path_streams_too(folder, resident):
    with reference_path():
        assert same(run(load_model(folder, stream=stream(2))[0]), resident)


@pytest.mark.parametrize("layout", ["hf", "hf-fused", "mlx"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layouts_that_need_no_conversion(tmp_path, layout, dtype):
    write_checkpoint(tmp_path, layout=layout, dtype=dtype)
    expected = run(load_model(tmp_path)[0], steps=3)
    pack(tmp_path, tmp_path / "packed")
    for source in (None, tmp_path / "packed"):
        model, _ = load_model(tmp_path, stream=stream(sidecar=source))
        assert same(run(model, steps=3), expected)


@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        AFFINE | {f"model.layers.{i}.mlp.switch_mlp.down_proj": {"group_size": 64, "bits": 6}
                  for i in range(5)},
    ],
    ids=["mxfp4", "nvfp4", "mixed"],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["hf", "mlx"])
def test_formats(tmp_path, quantization, layout):
    write_checkpoint(tmp_path, layout=layout, quantization=quantization)
    expected = run(load_model(tmp_path)[0], steps=3)
    assert same(run(load_model(tmp_path, stream=stream())[0], steps=3), expected)


@pytest.mark.slow
@pytest.mark.skipif(bool(metal_sim.unavailable()), reason=metal_sim.unavailable())
def test_the_metal_kernels_take_the_slots(folder, resident):
    model, _ = load_model(folder, stream=stream(4))
    with metal_sim.simulated():
        assert same(run(model, steps=3), resident[:5])
        assert any("moe_down_sum" in launch.kernel for launch in metal_sim.take_launches())


def test_two_generations_in_one_evaluation(folder):
    """The layers of the two interleave, and each needs the whole bank."""
    model, _ = load_model(folder, stream=stream(2))
    whole, _ = load_model(folder)
    tokens = [mx.array([[t]]) for t in (3, 99, 7)]
    mx.eval(results := [model(t) for t in tokens])
    for token, logits in zip(tokens, results, strict=True):
        assert mx.array_equal(logits, whole(token))


def test_a_step_that_is_never_evaluated(folder, resident):
    model, _ = load_model(folder, stream=stream(2))
    model(mx.array([[9]]))
    assert same(run(model), resident)


def test_python_does_not_wait_for_the_router(folder, monkeypatch):
    model, _ = load_model(folder, stream=stream(4))
    before = model.streaming.stats()
    logits = model(mx.array([[3, 4]]))
    assert model.streaming.stats() == before
    mx.eval(logits)
    assert model.streaming.stats()["misses"] > 0


def test_a_prompt_reads_each_expert_once(folder):
    model, _ = load_model(folder, stream=stream(3))
    for bank in model.streaming.banks.values():
        bank.take_requests()
    mx.eval(model(PROMPT))
    for bank in model.streaming.banks.values():
        experts = [set(request["experts"]) for request in bank.take_requests()]
        assert len(experts) > 1
        assert sum(map(len, experts)) == len(set.union(*experts))


def test_waves_cover_every_choice_once():
    rng = np.random.default_rng(1)
    experts = rng.integers(0, 40, (50, 4), dtype=np.int32)
    waves = plan_waves(experts, {31, 7}, 6)
    assert sorted(np.concatenate([w.pairs for w in waves])) == list(range(200))
    sets = [set(np.array(w.experts)[:, 0].tolist()) for w in waves]
    assert all(len(s) <= 6 for s in sets)
    assert sum(map(len, sets)) == len(np.unique(experts))
    assert {31, 7} <= sets[0]
    for wave in waves:
        assert (experts.reshape(-1)[wave.pairs] == np.array(wave.experts)[:, 0]).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_single_choices_sum_to_moe_decode(dtype):
    """Waves rest on this: outputs that are stored one by one and summed in order are the same."""
    mx.random.seed(3)
    x = mx.random.normal((5, 96)).astype(dtype)
    gate, up = (ops.Weight.dense(mx.random.normal((7, 50, 96)).astype(dtype)) for _ in range(2))
    down = ops.Weight.dense(mx.random.normal((7, 96, 50)).astype(dtype))
    slots = mx.random.randint(0, 7, (5, 3)).astype(mx.int32)
    scores = mx.random.uniform(shape=(5, 3))
    whole = ops.moe_decode(x, gate, up, down, slots, scores)
    rows = mx.repeat(x, 3, axis=0)
    parts = ops.moe_decode(rows, gate, up, down, slots.reshape(15, 1), mx.ones((15, 1)))
    assert mx.array_equal(ops.expert_sum(parts.reshape(5, 3, 96), scores), whole)


def test_a_model_without_experts_is_refused(tmp_path):
    write_checkpoint(tmp_path, tiny_config(first_k_dense_replace=5))
    with pytest.raises(ValueError, match="no routed experts to stream"):
        load_model(tmp_path, stream=stream())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            StreamOptions(budget=50 << 20),
            r"52\.43 MB cannot hold .* 245\.76 kB for 2 e.*; a budget of [0-9.]+[MG]B would fit\.",
        ),
        (stream(3, context=4097), "context of 4,097 tokens, expected 1 to 4,096, the model's own"),
        (stream(1), "1 slots a layer, expected 2 to 8"),
        (stream(9), "9 slots a layer, expected 2 to 8"),
        (stream(2, spares=1), "2 slots a layer, expected 3 to 8: a token needs 2 and 1 are spare"),
        (stream(3, policy="pinned", pins={1: [0, 1]}), "layer 1: 3 slots .* leave 1"),
        (stream(policy="fifo"), "policy must be"),
    ],
)
def test_what_cannot_work_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(folder, stream=options)


def test_a_budget_sizes_the_bank(folder):
    model, _ = load_model(folder, stream=stream(2))
    plan = model.streaming.plan
    slot = sum(layer.expert_bytes for layer in plan.layers)
    room = 5 * slot + slot // 2 + (1 << 26)
    exact = StreamOptions(budget=plan.shares.total + room)
    plan = load_model(folder, stream=exact)[0].streaming.plan
    assert plan.slots == min(8, (plan.budget - plan.shares.total) // slot)
    assert plan.total <= plan.budget
    assert re.search(rf"slots .* {plan.slots} of 8 x 4 layers", plan.format())
    assert load_model(folder, stream=StreamOptions())[0].streaming.plan.slots == 8


def test_a_refusal_says_what_would_fit(folder):
    """A context that fits is named, and does fit; the prefill step is the least already."""
    step = {"prefill_step_size": 32}
    shares = load_model(folder, stream=stream(2), **step)[0].streaming.plan.shares
    short = StreamOptions(budget=shares.total - shares.kv // 3)
    with pytest.raises(ValueError, match="a context of at most") as refusal:
        load_model(folder, stream=short)
    context = int(re.search(r"at most ([0-9,]+) tokens", str(refusal.value))[1].replace(",", ""))
    assert 256 <= context < 4096
    load_model(folder, stream=replace(short, context=context - 200))  # the process may have grown


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GB", 24 * 10**9), ("1.5 MiB", 3 << 19), ("512k", 512000), ("77B", 77)],
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "12 parsecs", "24", "24iB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


MEASURE = """
import json, sys
import numpy as np
from glm_fused.generation.generate import generate
from glm_fused.generation.options import Options
from glm_fused.loader import load
from glm_fused.streaming.options import StreamOptions

path, budget, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = StreamOptions(budget=budget, context=300 + tokens)
model, tokenizer = load(path, stream=options)
tokenizer._eos_token_ids = set()  # random text would end early
prompt = np.random.default_rng(0).integers(3, 250, 300).tolist()
completion = generate(model, tokenizer, prompt, Options(max_tokens=tokens, temp=1.0, seed=1))
status = dict(line.split(":") for line in open("/proc/self/status"))
plan, stats = model.streaming.plan, model.streaming.stats()
print(json.dumps({
    "tokens": len(completion.tokens), "process": plan.shares.process, "dense": plan.shares.dense,
    "slots": plan.slots, "slot_bytes": plan.slot_bytes, "planned": plan.total,
    "peak": int(status["VmHWM"].split()[0]) << 10, "end": int(status["VmRSS"].split()[0]) << 10,
    "hit_rate": stats["hit_rate"], "read": stats["bytes"],
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("tokens", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_stays_within_the_budget(tmp_path, tokens):
    """With experts of 400 MB in a budget of 400 MB, the bank is most of what is resident."""
    config = tiny_config(
        moe_intermediate_size=1024, hidden_size=512, n_routed_experts=32, eos_token_id=None
    )
    write_checkpoint(tmp_path, config, dtype="bfloat16")
    write_tokenizer(tmp_path)
    budget = 400 << 20
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(budget), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert found["tokens"] == tokens
    assert 8 <= found["slots"] < 32
    assert found["slot_bytes"] > 0.3 * budget
    held = found["process"] // 2 + found["dense"] + found["slot_bytes"]
    assert held <= found["end"] <= found["peak"] <= found["planned"] <= budget


def test_a_file_that_shrinks_while_it_is_used(tmp_path):
    write_checkpoint(tmp_path, quantization=AFFINE)
    expected = run(load_model(tmp_path)[0])
    file = tmp_path / "model.safetensors"
    model, _ = load_model(tmp_path, stream=stream(4))
    data = file.read_bytes()
    with file.open("r+b") as f:
        f.truncate(len(data) // 4)
    with pytest.raises(RuntimeError, match=r"layer \d, expert \d: .*model.safetensors: "):
        run(model)
    file.write_bytes(data)
    with pytest.raises(RuntimeError, match="written to while it was in use"):
        run(model)
    model, _ = load_model(tmp_path, stream=stream(4))
    file.unlink()  # open files stay readable
    assert same(run(model), expected)


BACKWARDS = """
import sys
sys.path.insert(0, {tests!r})
from test_streaming import load_model, mx, run, same, stream
expected = run(load_model({folder!r})[0])
for slots, spares in ((4, 0), (5, 1), (8, 0)):
    options = stream(slots, spares=spares, sidecar={folder!r} + "/sidecar")
    model, _ = load_model({folder!r}, stream=options)
    if (slots, spares) == (4, 0):
        try:
            for token in range(250):
                mx.eval(model(mx.array([[token]])))
        except RuntimeError as error:
            print(error)
    assert same(run(model), expected), slots
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_experts_that_arrive_last_first(tmp_path):
    """The first read of the first expert fails, after those of the others."""
    write_checkpoint(tmp_path, tiny_config(num_experts_per_tok=4), quantization=AFFINE)
    pack(tmp_path, tmp_path / "sidecar")
    shim = build(tmp_path, "faults.so", "-shared", "-fPIC", ROOT / "tests/cpp/faulty_preadv.cpp")
    code = BACKWARDS.format(tests=str(ROOT / "tests"), folder=str(tmp_path))
    env = os.environ | {"LD_PRELOAD": str(shim), "FAULT": "BACKWARDS"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    error, *rest = result.stdout.splitlines()
    assert re.search(r"layer \d, expert 0: .*layer_00\d\.bin: Input/output error", error)
    assert rest == ["fine"]


def test_a_trace_and_its_replay(folder, tmp_path):
    model, tokenizer = load(folder, stream=stream(4))
    with (tmp_path / "trace.jsonl").open("w") as file:
        trace = TraceWriter(model.streaming, file, TOP_K)
        completion = generate(model, tokenizer, [3, 4, 5], Options(max_tokens=30, temp=1.0))
        trace.write()
    trace = read_trace(tmp_path / "trace.jsonl")
    assert trace.tokens in (len(completion.tokens) + 2, len(completion.tokens) + 3)
    assert sorted(trace.requests) == [1, 2, 3, 4]
    policies = ["learned", "lru", "s3fifo", "pinned"]
    result = replay(trace, [2, 4, 8], policies, read_rate=1e9)
    rates = {(row["slots"], row["policy"]): row["hit_rate"] for row in result["rows"]}
    stats = model.streaming.stats()
    assert rates[4, "learned"] == stats["hit_rate"]  # what the replay says is what happened
    for slots in (2, 4, 8):
        best = rates[slots, "optimum"]
        assert all(rates[slots, p] <= best for p in policies)
    assert rates[2, "lru"] < rates[4, "lru"] < rates[8, "lru"]


def test_expert_tensors_are_told_from_others():
    from glm_fused.models.tensor_names import is_expert

    names = [name for name in make_tensors(tiny_config()) if is_expert(name)]
    assert len(names) == 4 * 3
    assert not any("shared_experts" in name or ".gate.weight" in name for name in names)
