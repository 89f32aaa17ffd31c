"""Stock mlx-lm (load, generate, batch_generate, server) running this package's models."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glm_fused.engine import Engine
from glm_fused.engine_options import EngineOptions
from glm_fused.mlx_lm.registration import Loading, register
from glm_fused.models.config import ARGS_CLASSES, args_from_config
from glm_fused.models.decoder import Model

VOCAB, TOPK = 64, 8
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 38, 32]  # over twice TOPK
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": TOPK,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "eos_token_id": [VOCAB - 1],
}
TYPES = {
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "shared"]},
    "deepseek_v32": {},
}


def write_checkpoint(folder: Path, model_type: str, **changes: object) -> Path:
    """Write a random model in MLX's layout, with a tokenizer whose token i is the word ``wi``."""
    folder.mkdir()
    config = CONFIG | TYPES[model_type] | {"model_type": model_type} | changes
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(7)
    model = Model(args_from_config(config))
    weights = {k: 3 * v for k, v in tree_flatten(model.parameters())}
    # EOS is a copy of token 0, so it is never the argmax.
    weights["lm_head.weight"][VOCAB - 1] = weights["lm_head.weight"][0]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    eos = f"w{VOCAB - 1}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TYPES)
def checkpoint(request, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    register()
    return mlx_lm.load(str(checkpoint))


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation, each token from a prefill of everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(mx.argmax(model(mx.array([tokens]))[0, -1]).item())
    return tokens[len(prompt) :]


def test_load_uses_our_classes(loaded, checkpoint):
    model, tokenizer = loaded
    assert type(model) is Model
    assert type(model.args) is ARGS_CLASSES[checkpoint.name]
    assert model.args.index_topk == TOPK
    assert tokenizer.encode("w5 w7") == [5, 7]


def test_loading_goes_through_the_engine(checkpoint, monkeypatch):
    made = []

    class Watched(Engine):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            made.append(self)

    monkeypatch.setattr("glm_fused.mlx_lm.registration.Engine", Watched)
    register(Loading(EngineOptions(kv_format="fp8", slots=3)))
    try:
        model, _ = mlx_lm.load(str(checkpoint))
    finally:
        register()
    (engine,) = made
    assert engine.model is model
    assert (model.kv_format, engine.streaming.plan.slots) == ("fp8", 3)
    engine.close()


@pytest.mark.parametrize("prefill_step_size", [2048, 5])
def test_stream_generate(loaded, prefill_step_size):
    model, tokenizer = loaded
    stream = mlx_lm.stream_generate(
        model, tokenizer, PROMPT, max_tokens=12, prefill_step_size=prefill_step_size
    )
    assert [response.token for response in stream] == greedy(model, PROMPT, 12)


def test_prompt_cache_is_trimmed_and_reused(loaded):
    model, tokenizer = loaded
    kv = model.make_cache()
    mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=6, prompt_cache=kv)
    kept = len(PROMPT) - 4
    for layer in kv:
        layer.trim(layer.size() - kept)
    tail = [1, 2, 3]
    stream = mlx_lm.stream_generate(model, tokenizer, tail, max_tokens=6, prompt_cache=kv)
    assert [response.token for response in stream] == greedy(model, PROMPT[:kept] + tail, 6)


def test_batch_generate(loaded):
    """Rows have unequal lengths, some shorter than index_topk, as mlx-lm pads and merges them."""
    model, tokenizer = loaded
    prompts = [PROMPT, PROMPT[3:8], PROMPT[2:16], [11, 2]]
    counts = [10, 4, 8, 10]
    response = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=counts, prefill_step_size=6
    )
    texts = [tokenizer.decode(greedy(model, p, n)) for p, n in zip(prompts, counts, strict=True)]
    assert response.texts == texts


def test_batch_generate_continues_caches(loaded):
    """Finished rows are extracted, merged again and extended, indexer caches included."""
    model, tokenizer = loaded
    prompts = [PROMPT, PROMPT[5:15]]
    first = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=3, return_prompt_caches=True
    )
    assert [cache[0].size() for cache in first.caches] == [len(p) + 3 for p in prompts]
    tails = [[1, 2], [3, 4, 5]]
    second = mlx_lm.batch_generate(
        model, tokenizer, tails, max_tokens=5, prompt_caches=first.caches
    )
    histories = [p + greedy(model, p, 3) + t for p, t in zip(prompts, tails, strict=True)]
    assert second.texts == [tokenizer.decode(greedy(model, h, 5)) for h in histories]


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("affine", 32, 4), ("mxfp4", 32, 4)])
def test_quantized_checkpoint(tmp_path, mode, group_size, bits):
    """mlx-lm's own quantizer and loader agree with our layers about names and shapes."""
    register()
    source = write_checkpoint(tmp_path / "float", "glm_moe_dsa")
    target = tmp_path / "packed"
    mlx_lm.convert(
        str(source), str(target), quantize=True, q_group_size=group_size, q_bits=bits, q_mode=mode
    )
    model, _ = mlx_lm.load(str(target))
    packed = model.layers[1].mlp.switch_mlp.up_proj.as_weight()
    fmt = packed.format
    assert (fmt.bits, fmt.group_size, fmt.mode) == (bits, group_size, mode)
    assert "scales" in model.layers[0].self_attn.embed_q
    logits = np.array(model(mx.array([PROMPT])).astype(mx.float32))
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "glm_fused.mlx_lm", *args]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def test_command_line(loaded, checkpoint):
    prompt = " ".join(f"w{i}" for i in PROMPT)
    run = subprocess.run(
        command("generate", "--model", str(checkpoint), "--prompt", prompt, "--max-tokens", "5",
                "--ignore-chat-template", "--verbose", "False"),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    model, tokenizer = loaded
    assert tokenizer.decode(greedy(model, PROMPT, 5)) in run.stdout


def post(server: subprocess.Popen, port: int, **body: object) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.URLError as error:
            broken = isinstance(error, urllib.error.HTTPError) or server.poll() is not None
            if broken or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_server_reuses_its_prompt_cache(tmp_path):
    register()
    checkpoint = write_checkpoint(tmp_path / "glm", "glm_moe_dsa")
    model, tokenizer = mlx_lm.load(str(checkpoint))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        command("server", "--model", str(checkpoint), "--port", str(port)), env=environment()
    )
    try:
        for prompt in (PROMPT, [*PROMPT, 1, 2, 3], [*PROMPT[:14], 4, 5]):
            text = " ".join(f"w{i}" for i in prompt)
            reply = post(server, port, prompt=text, max_tokens=5, temperature=0)
            expected = tokenizer.decode(greedy(model, prompt, 5))
            assert reply["choices"][0]["text"].split() == expected.split()
    finally:
        server.terminate()
        server.wait(30)
