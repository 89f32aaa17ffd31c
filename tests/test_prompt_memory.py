"""A prompt takes no more memory than is planned for it, however long, however it is stored."""

import gc
import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import write_tokenizer

import glm_fused
from glm_fused import Engine, EngineOptions, _ext
from glm_fused.checkpoint.description import describe, format_description
from glm_fused.generation import planning
from glm_fused.generation.planning import plan_prompt
from glm_fused.models.config import args_from_config
from glm_fused.models.prompt_memory import STEPS, chunk_bytes, fitting_step

pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="tells of the CPU's kernels")
AFTER = 4  # tokens generated after a prompt
SHAPES = {
    "wide": dict(hidden_size=256, intermediate_size=1024),
    "many heads": dict(num_attention_heads=16, kv_lora_rank=256, index_topk=64),
    "dense": dict(first_k_dense_replace=5, intermediate_size=512),
    "many experts": dict(n_routed_experts=16, num_experts_per_tok=8, moe_intermediate_size=256),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, shape in SHAPES.items():
        folder = made[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        config = tiny_config(max_position_embeddings=4096, eos_token_id=None, **shape)
        write_checkpoint(folder, config, dtype="bfloat16")
        write_tokenizer(folder)
    return made


def taken(folder, tokens, **options):
    """What a prompt took beyond what was there before, and its completion."""
    gc.collect()  # an earlier engine
    mx.synchronize()
    _ext.reset_peak_scratch()  # to what recorded steps of other engines hold
    before = mx.get_active_memory() + _ext.peak_scratch_bytes()
    prompt = np.random.default_rng(0).integers(3, 250, tokens).tolist()
    with Engine(folder, EngineOptions(**options)) as engine:
        engine.tokenizer._eos_token_ids = set()
        completion = engine.generate(prompt, max_tokens=AFTER)
        plan = plan_prompt(engine.model, tokens + AFTER)
    assert completion.planned_memory_bytes == plan.total
    assert completion.prefill_step_size == plan.prefill_step_size
    peak = completion.peak_memory_bytes - before + completion.peak_scratch_bytes
    return peak, plan


@pytest.mark.parametrize("kv_format", ["auto", "fp8", "int8"])
@pytest.mark.parametrize("tokens", [20, 300, 1500])
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_keeps_to_its_plan(folders, name, tokens, kv_format):
    peak, plan = taken(folders[name], tokens, kv_format=kv_format)
    assert peak <= plan.total, plan
    assert plan.prefill_step_size == STEPS[0]
    if tokens > 1000:  # else small arrays count
        assert plan.temporaries <= 6 * (peak - plan.weights), plan


@pytest.mark.parametrize("step", [16, 48, 700])
@pytest.mark.parametrize("name", SHAPES)
def test_a_prefill_step_rules(folders, name, step):
    peak, plan = taken(folders[name], 1500, prefill_step_size=step)
    assert plan.prefill_step_size == step
    assert peak <= plan.total, plan


def test_a_prompt_with_drafts_keeps_to_its_plan(tmp_path):
    """The MTP layer, its cache, and the steps that are recorded to verify so many drafts."""
    config = tiny_config(max_position_embeddings=4096, eos_token_id=None)
    write_checkpoint(tmp_path, config, dtype="bfloat16", mtp=True)
    write_tokenizer(tmp_path)
    plain, _ = taken(tmp_path, 20)
    peak, plan = taken(tmp_path, 20, draft=8, draft_from="mtp")
    assert plain < peak <= plan.total, plan


def test_a_longer_step_than_planned_takes_more(folders):
    """The plan is no number that everything fits in."""
    peak, _ = taken(folders["wide"], 1500)
    _, plan = taken(folders["wide"], 1500, prefill_step_size=64)
    assert peak > plan.total


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
@pytest.mark.parametrize("tokens", [20, 700])
@pytest.mark.parametrize("name", ["wide", "many experts"])
def test_a_streamed_prompt_keeps_to_its_plan(folders, name, tokens, kv_format):
    options = dict(memory_budget="8GB", slots=8, context=1024, kv_format=kv_format)
    peak, plan = taken(folders[name], tokens, **options)
    assert peak <= plan.total, plan


def test_a_budget_chooses_the_step(folders):
    """A smaller budget gives a smaller step; one too small for the smallest is refused."""
    folder, options = folders["wide"], dict(slots=8, context=4000)

    def plan(budget, **more):
        how = EngineOptions(memory_budget=budget, **options, **more)
        with Engine(folder, how, tokenizer=False, lazy=True) as engine:
            return engine.streaming.plan

    roomy = plan("8GB")
    assert roomy.prefill_step_size == STEPS[0]
    args = glm_fused.load_model(folder, lazy=True)[0].args
    longest, shortest = (chunk_bytes(args, step, 4000, 2, True) for step in (STEPS[0], STEPS[-1]))
    least = roomy.total - longest + shortest
    tight = plan(least + (longest - shortest) // 2)
    assert STEPS[-1] < tight.prefill_step_size < STEPS[0]
    assert tight.total <= tight.budget
    assert f"{tight.prefill_step_size:,} tokens of a prompt" in tight.format()
    with pytest.raises(ValueError, match=r"\[budget\] .* 32 tokens of a prompt at a time, .* fit"):
        plan(least - (32 << 20))
    refused = rf"2,048 tokens of a prompt .* a prefill step of {tight.prefill_step_size:,} tokens"
    with pytest.raises(ValueError, match=refused):
        plan(tight.budget, prefill_step_size=STEPS[0])


def test_a_small_machine_takes_small_steps(folders, monkeypatch):
    model, _ = glm_fused.load_model(folders["wide"])
    roomy = plan_prompt(model, 3000)
    assert roomy.prefill_step_size == STEPS[0]
    monkeypatch.setattr(planning, "SHARE", 1.0)
    for machine in (roomy.total - 1, roomy.weights + roomy.cache + roomy.temporaries // 2):
        monkeypatch.setattr(planning, "machine_bytes", lambda machine=machine: machine)
        plan = plan_prompt(model, 3000)
        assert plan.prefill_step_size < STEPS[0]
        assert plan.total <= machine
    monkeypatch.setattr(planning, "machine_bytes", lambda: 1)
    assert plan_prompt(model, 3000).prefill_step_size == STEPS[-1]
    model.prefill_step_size = 100
    assert plan_prompt(model, 3000).prefill_step_size == 100


def test_the_largest_step_that_fits():
    assert fitting_step(lambda step: 10 * step, 10 * 2048) == 2048
    assert fitting_step(lambda step: 10 * step, 10 * 2048 - 1) == 1024
    assert fitting_step(lambda step: 10 * step, 1) == 32


def test_a_gpu_keeps_the_words_of_its_indexer(monkeypatch):
    """Those of two layers, where some keys are left out."""
    args = args_from_config(tiny_config())
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(_ext, "index_scratch_bytes", lambda *sizes: asked.append(sizes) or 1 << 30)
    asked = []
    assert 2 << 30 < chunk_bytes(args, 512, 4096, 2, False) < 3 << 30
    assert asked == [(512, 4096, args.index_topk)]
    assert chunk_bytes(args, 512, args.index_topk, 2, False) < 1 << 30


@pytest.mark.parametrize("step", [0, -1, 2**20 + 1, 2.0, True, "64"])
def test_a_step_that_is_none(step):
    with pytest.raises(ValueError, match=r"prefill_step_size is .*, expected an integer from 1"):
        EngineOptions(prefill_step_size=step)


def test_inspect_tells_the_plan(folders):
    found = describe(folders["wide"])
    plan = found["prompt_memory"]
    assert json.loads(json.dumps(plan)) == plan
    assert plan["total"] == plan["weights"] + plan["cache"] + plan["temporaries"]
    assert plan["weights"] == found["bytes_loaded"]
    assert plan["context"] == 4096
    model, _ = glm_fused.load_model(folders["wide"])
    model.prefill_step_size = plan["prefill_step_size"]
    assert replace(plan_prompt(model, 4096)).describe() == plan
    assert " memory  " in format_description(found)


SCRATCH = """
import mlx.core as mx
import glm_fused
from glm_fused import _ext
mx.set_default_device(mx.cpu)
q, keys = mx.ones((1, 64, 4, 32)), mx.ones((1, 1000, 32))
mx.eval(q, keys)
_ext.reset_peak_scratch()
assert _ext.peak_scratch_bytes() == 0
mx.eval(glm_fused.ops.indexer_topk(q, keys, mx.ones((1, 64, 4)), 16, scale=1.0))
mx.synchronize()
print(_ext.peak_scratch_bytes())
"""


def test_scratch_memory_is_counted():
    """The indexer holds a score for each query and key; nothing else has any in that process."""
    run = subprocess.run([sys.executable, "-c", SCRATCH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 4 * 64 * 1000 <= int(run.stdout) <= 8 * 64 * 1000
