"""mlx-lm's own commands, through ``python -m glm_fused.mlx_lm``, on the bundled model."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import openai
import pytest
from conftest import write_checkpoint
from mlx.utils import tree_flatten
from test_generate import write_tokenizer
from test_mlx_lm import command, environment

import glm_fused
from glm_fused.checkpoint.declaration import quantization_from_config
from glm_fused.checkpoint.description import describe
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.formats.weights import dequantize, plane_names
from glm_fused.generation.generate import generate
from glm_fused.generation.options import Options
from glm_fused.mlx_lm import __main__ as ours
from glm_fused.streaming.pack import pack

PROMPT = "def add(a, b):\n    return"
EXAMPLES = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i)\n",
    "class A:\n    def f(self):\n        pass\n",
    "import os\nprint(os.getcwd())\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A writable copy of the bundled model and data to train on, in the current folder."""
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(bundled_folder(), folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in EXAMPLES)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """A function that runs a command in ``folder``; it gives exit code, stdout and stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GLM_FUSED_DEBUG", raising=False)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glm_fused.mlx_lm", *map(str, args)])
        capsys.readouterr()
        try:
            code = ours.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def generating(*args: object, tokens: int = 8) -> tuple[object, ...]:
    return ("generate", "--prompt", PROMPT, "--max-tokens", tokens, "--ignore-chat-template",
            "--verbose", "False", *args)  # fmt: skip


def continuation(path: Path, tokens: int = 8) -> str:
    """The continuation by this package's own loader and generator."""
    model, tokenizer = glm_fused.load(path)
    return generate(model, tokenizer, tokenizer.encode(PROMPT), Options(tokens)).text


def dense_weights(path: Path) -> dict[str, mx.array]:
    """Every parameter in float32; packed weights are dequantized."""
    model, _ = glm_fused.load_model(path)
    weights = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        if "scales" in module:
            for plane in plane_names(module.format):
                del weights[f"{name}.{plane}"]
            weights[f"{name}.weight"] = dequantize(module.as_weight(), mx.float32)
    return {name: value.astype(mx.float32) for name, value in weights.items()}


def one_line(code: int, err: str, pattern: str) -> None:
    assert code == 2, err
    lines = err.strip().splitlines()
    assert re.search(pattern, lines[-1]), err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def dense(folder) -> Path:
    """The bundled model, dequantized by ``convert -d``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(
            sys, "argv", ["x", "convert", "--hf-path", "model", "-d", "--mlx-path", "dense"]
        )
        assert ours.main() == 0
    return folder / "dense"


def test_convert_dequantizes_every_weight(folder, dense):
    assert "quantization" not in json.loads((dense / "config.json").read_text())
    expected, found = dense_weights(folder / "model"), dense_weights(dense)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.array_equal(found[name], value), name
    # Dequantized values are rounded to bfloat16, so a text may part at a near tie.
    logits = logits_of(folder / "model")
    assert np.abs(logits_of(dense) - logits).max() < 0.05 * logits.max()


@pytest.mark.parametrize("mode", ["mxfp4", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_convert_quantizes_and_back(run, dense, folder, mode):
    packed, back = folder / mode, folder / f"{mode}-back"
    arguments = ("--hf-path", dense, "-q", "--q-mode", mode, "--mlx-path", packed)
    assert run("convert", *arguments)[0] == 0
    model, config = glm_fused.load_model(packed)
    assert config["quantization"]["mode"] == mode
    assert {m.mode for m in model.modules() if "scales" in m} == {mode}
    assert run("convert", "--hf-path", packed, "-d", "--mlx-path", back)[0] == 0
    expected, found = dense_weights(packed), dense_weights(back)
    assert all(mx.array_equal(found[name], value) for name, value in expected.items())


def test_convert_with_a_recipe(run, dense, folder):
    """mlx-lm writes ``"group_size": null`` into the config."""
    code, _, err = run(
        "convert", "--hf-path", dense, "-q", "--quant-predicate", "mixed_4_6",
        "--mlx-path", folder / "mixed",
    )  # fmt: skip
    assert code == 0, err
    config = Checkpoint.open(folder / "mixed").config
    assert config["quantization"]["lm_head"]["group_size"] is None
    assert str(quantization_from_config(config).declared("lm_head")[0]) == "affine6"
    assert describe(folder / "mixed")["warnings"] == []
    code, out, _ = run(*generating("--model", "mixed"))
    assert code == 0
    assert continuation(folder / "mixed").strip() == out.strip()


def test_convert_keeps_routers_and_indexers(run, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    write_checkpoint(source, layout="hf")
    write_tokenizer(source)
    code, _, err = run("convert", "--hf-path", source, "--mlx-path", target, "-q")
    assert code == 0, err
    found = describe(target)
    formats = {name: kind["formats"] for name, kind in found["formats"].items()}
    assert formats.pop("indexer") == formats.pop("router") == formats.pop("norms") == ["bf16"]
    assert set(map(tuple, formats.values())) == {("affine4",)}
    assert found["warnings"] == []


GROUPS = {"group_size": 32, "bits": 4}


LAYOUTS = {
    "hf": ("hf", None), "hf-g32": ("hf", GROUPS), "hf-g128": ("hf", GROUPS | {"group_size": 128}),
    "hf-fused": ("hf-fused", None), "fp8": ("fp8", None), "mlx-g32": ("mlx", GROUPS),
}  # fmt: skip
CHANGES = {"as it is": (), "-d": ("-d",), "-q": ("-q", "--q-bits", 8)}
QUICK = {("hf-g32", "-d"), ("fp8", "as it is"), ("hf-fused", "-q"), ("hf-g128", "-d")}


@pytest.mark.parametrize(
    ("layout", "quantization", "options"),
    [
        pytest.param(
            *made, options, id=f"{name}, {change}",
            marks=() if (name, change) in QUICK else pytest.mark.slow,
        )
        for name, made in LAYOUTS.items()
        for change, options in CHANGES.items()
    ],
)  # fmt: skip
def test_convert_every_layout(run, tmp_path, layout, quantization, options):
    source, target = tmp_path / "source", tmp_path / "target"
    write_checkpoint(source, layout=layout, quantization=quantization)
    write_tokenizer(source)
    code, _, err = run("convert", "--hf-path", source, "--mlx-path", target, *options)
    assert code == 0, err
    expected, found = dense_weights(source), dense_weights(target)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 0.02 * mx.abs(value).max().item()  # eight bits, or bfloat16, are as close
        assert mx.abs(found[name] - value).max().item() <= tolerance, name
    if options == ("-d",):
        files = [mx.load(str(path)) for path in target.glob("*.safetensors")]
        assert not any(".scales" in name for file in files for name in file)


@pytest.fixture
def interpreted():
    """Turn mlx.compile off: a C++ compiler takes minutes for what a test needs once."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def losses(out: str) -> list[float]:
    """The training losses that mlx-lm reports."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", out)
    return [float(loss) for loss in re.findall(r"^\s+\d+\s+(\d+\.\d+) ▼", plain, re.M)]


@pytest.fixture
def adapter(run, folder, interpreted) -> Path:
    path = folder / "adapter"
    if not path.exists():
        code, out, err = run(
            "lora", "--model", "model", "--train", "--data", "data", "--iters", 10,
            "--batch-size", 2, "--num-layers", -1, "--learning-rate", 1e-4,
            "--steps-per-report", 2, "--val-batches", 1, "--adapter-path", path,
        )  # fmt: skip
        assert code == 0, err
        found = losses(out)
        assert len(found) == 5 and found[-1] < 0.5 * found[0], out
    return path


def test_lora_trains_and_generates(run, adapter, folder):
    keys = mx.load(str(adapter / "adapters.safetensors")).keys()
    for part in ("self_attn.q_b_proj", "mlp.switch_mlp.down_proj", "mlp.shared_experts.up_proj"):
        assert f"model.layers.3.{part}.lora_a" in keys
    assert not any("embed_q" in key for key in keys)  # nor does mlx-lm adapt it
    code, out, err = run(*generating("--model", "model", "--adapter-path", adapter))
    assert code == 0, err
    assert out.strip() == "a + b"


def test_an_adapter_of_streamed_experts_is_refused(run, adapter):
    streamed = generating("--model", "model", "--adapter-path", adapter, "--slots", 4)
    code, _, err = run(*streamed)
    one_line(code, err, "adapter/adapters.safetensors adapts routed experts, which are streamed")


def logits_of(path: Path, adapter: Path | None = None) -> np.ndarray:
    model, tokenizer = mlx_lm.load(str(path), adapter_path=adapter and str(adapter))
    logits = model(mx.array([tokenizer.encode(PROMPT)]))
    return np.array(logits.astype(mx.float32))


def test_fuse(run, adapter, folder):
    code, _, err = run("fuse", "--model", "model", "--adapter-path", adapter,
                       "--save-path", "fused")  # fmt: skip
    assert code == 0, err
    assert continuation(folder / "fused").strip().startswith("a")  # it was trained on "a + b"
    assert not continuation(folder / "model").strip().startswith("a")
    code, _, err = run("fuse", "--model", "model", "--adapter-path", adapter,
                       "--save-path", "fused-dense", "--dequantize")  # fmt: skip
    assert code == 0, err
    expected = logits_of(folder / "model", adapter)
    assert np.abs(logits_of(folder / "model") - expected).max() > 1
    assert np.abs(logits_of(folder / "fused-dense") - expected).max() < 0.05 * expected.max()


@pytest.mark.slow
def test_lora_in_a_process_of_its_own(folder):
    """It trains with mlx.compile, as a user does."""
    done = subprocess.run(
        command("lora", "--model", "model", "--train", "--data", "data", "--iters", "10",
                "--batch-size", "2", "--num-layers", "-1", "--learning-rate", "1e-4",
                "--steps-per-report", "2", "--val-batches", "1", "--adapter-path", "compiled"),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = losses(done.stdout)
    assert len(found) == 5 and found[-1] < 0.5 * found[0], done.stdout


@pytest.mark.slow
def test_full_fine_tuning_of_dense_weights(run, dense, interpreted):
    code, out, err = run(
        "lora", "--model", dense, "--train", "--fine-tune-type", "full", "--data", "data",
        "--iters", 4, "--batch-size", 2, "--num-layers", 2, "--learning-rate", 1e-3,
        "--steps-per-report", 1, "--val-batches", 1, "--adapter-path", "full",
    )  # fmt: skip
    assert code == 0, err
    found = losses(out)
    assert found[-1] < found[0], out


def test_cache_prompt(run, folder):
    code, _, err = run("cache_prompt", "--model", "model", "--prompt", PROMPT,
                       "--prompt-cache-file", "c.safetensors", "--kv-format", "int8")  # fmt: skip
    assert code == 0, err
    arrays = mx.load(str(folder / "c.safetensors"))
    assert mx.int8 in {array.dtype for array in arrays.values()}
    following = ("generate", "--prompt-cache-file", "c.safetensors", "--prompt", " a",
                 "--max-tokens", 4, "--verbose", "False")  # fmt: skip
    code, out, err = run(*following)
    assert (code, bool(out.strip())) == (0, True), err
    code, _, err = run(*following, "--kv-format", "fp8")
    one_line(code, err, "--kv-format fp8: the cache in c.safetensors keeps its own")


def test_experts_are_streamed(run, folder):
    expected = continuation(folder / "model")
    pack(folder / "model", folder / "sidecar")
    for options in (("--slots", 4), ("--memory-budget", "2GB", "--sidecar", "sidecar")):
        code, out, err = run(*generating("--model", "model", *options))
        assert code == 0, err
        assert out.strip() == expected.strip()
        assert "slots" in err
    code, _, err = run(*generating("--model", "model", "--memory-budget", "1MB"))
    one_line(code, err, r"\[budget\] 1\.00 MB cannot hold")


def test_benchmark(run):
    code, out, err = run("benchmark", "--model", "model", "-p", 8, "-g", 4, "-n", 1,
                         "--kv-format", "int8", "--slots", 4)  # fmt: skip
    assert code == 0, err
    assert "Averages: prompt_tps=" in out
    code, _, err = run("benchmark", "--model", "model", "-qa")
    one_line(code, err, "do not take quantize_activations=True")


def test_what_our_caches_ignored_is_refused(run):
    for name in ("generate", "cache_prompt", "chat"):
        rest = () if name == "chat" else ("--prompt", "a")
        rest += ("--prompt-cache-file", "x.safetensors") if name == "cache_prompt" else ()
        code, _, err = run(name, "--model", "model", "--max-kv-size", 8, *rest)
        one_line(code, err, "--max-kv-size 8 would forget keys")
    code, _, err = run(*generating("--model", "model", "--kv-bits", 8))
    one_line(code, err, "--kv-bits 8 is for caches of other models; --kv-format int8")
    model, tokenizer = mlx_lm.load("model")
    with pytest.raises(ValueError, match=r"kv_bits=4 .* --kv-format"):
        list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=2, kv_bits=4))


def test_commands_that_would_leave_our_layers_out_are_refused(run):
    code, _, err = run("gptq", "--model", "model")
    one_line(code, err, "gptq finds none of these models' layers")
    code, _, err = run("awq", "--model", "model")
    one_line(code, err, "AWQ support for glm_moe_dsa models")


@pytest.mark.parametrize("name", ["convert", "lora", "fuse"])
def test_commands_that_read_everything_take_no_streaming(run, name):
    code, _, err = run(name, "--model", "model", "--memory-budget", "1GB")
    one_line(code, err, f"--memory-budget: {name} reads all weights")


def test_commands(run):
    for args in ((), ("nonsense",)):
        code, _, err = run(*args)
        one_line(code, err, "error: CLI requires a subcommand in .*'generate'")
    code, out, _ = run("--help")
    assert code == 0 and "supported subcommands" in out
    code, out, _ = run("chat", "--help")
    assert code == 0
    assert "usage: python -m glm_fused.mlx_lm chat" in out
    assert "--kv-format" in out and "--memory-budget" in out
    code, _, err = run(*generating("--model", "model", "--trace", "t", "--slots", 4))
    one_line(code, err, "--trace is an option of glm-fused generate")


def damaged(folder: Path, damage: str) -> Path:
    """Make a copy of the model with one thing wrong."""
    path = folder / damage
    shutil.copytree(folder / "model", path)
    file = path / "model.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 100)
        return path
    tensors = dict(mx.load(str(file)))
    name = "model.layers.2.self_attn.o_proj.scales"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors[f"{name}2"] = tensors[name]
    else:
        tensors[name] = tensors[name][:-1]
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    return path


@pytest.mark.parametrize("damage", ["truncated", "missing", "unexpected", "misshapen"])
@pytest.mark.parametrize("name", ["generate", "convert"])
def test_loading_is_strict(run, folder, tmp_path, damage, name):
    path = damaged(folder, damage) if not (folder / damage).exists() else folder / damage
    arguments = {
        "generate": generating("--model", path),
        "convert": ("convert", "--hf-path", path, "--mlx-path", tmp_path / "out"),
    }[name]
    code, _, err = run(*arguments)
    one_line(code, err, r"^glm_fused\.mlx_lm: error: .*(model\.layers|tensor)")
    assert not (tmp_path / "out").exists()


def test_weights_that_mlx_saved_without_metadata(run, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    file = str(tmp_path / "model" / "model.safetensors")
    mx.save_safetensors(file, dict(mx.load(file)))
    assert b'"__metadata__":null' in Path(file).read_bytes()[:40]
    assert run(*generating("--model", tmp_path / "model"))[0] == 0


def test_a_folder_without_a_model(run, tmp_path):
    code, _, err = run(*generating("--model", tmp_path))
    one_line(code, err, "has no config.json")
    (tmp_path / "config.json").write_text("{")
    code, _, err = run(*generating("--model", tmp_path))
    one_line(code, err, "config.json is not JSON")
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(*generating("--model", tmp_path))
    one_line(code, err, "has no model_type")


def test_other_models_go_on_through_stock_code(run, folder):
    from mlx_lm.models import llama

    path = folder / "llama"
    shutil.copytree(folder / "model", path)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 2048,
        "intermediate_size": 64, "num_attention_heads": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    mx.random.seed(5)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    _, tokenizer = mlx_lm.load("model")
    expected = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8)
    code, out, err = run(*generating("--model", path, "--kv-bits", 8))
    assert code == 0, err
    assert out.strip() == expected.strip()
    code, _, err = run(*generating("--model", path, "--kv-format", "int8"))
    one_line(code, err, "is 'llama', but --kv-format is for glm_moe_dsa and deepseek_v32 only")


@pytest.mark.slow
def test_perplexity(run):
    pytest.importorskip("datasets")
    code, out, err = run(
        "perplexity", "--model", "model", "--data-path", "data", "--sequence-length", 8,
        "--num-samples", 4, "--batch-size", 2,
    )  # fmt: skip
    assert code == 0, err
    assert float(re.search(r"Perplexity: (\d+\.\d+)", out)[1]) < 200


def test_evaluate(folder):
    """lm-evaluation-harness gets a task and data of our own, as it would download others.

    It runs in a process of its own, since it brings thread pools of other libraries.
    """
    pytest.importorskip("lm_eval")
    questions = [
        {"q": "import", "choices": [" os", " zebra"], "answer": 0},
        {"q": "def f(x):\n    return", "choices": [" import", " x"], "answer": 1},
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "questions.jsonl").write_text(lines)
    task = {
        "task": "completions", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "task.yaml").write_text(json.dumps(task))
    run = subprocess.run(
        command("evaluate", "--model", "model", "--tasks", "task.yaml", "--output-dir", "results",
                "--no-apply-chat-template", "--kv-format", "fp8"),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (result,) = (folder / "results").iterdir()
    assert json.loads(result.read_text())["completions"]["acc,none"] == 1.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_openai_client(folder, adapter):
    port = free_port()
    server = subprocess.Popen(
        command("server", "--model", "model", "--port", str(port), "--kv-format", "int8"),
        cwd=folder, env=environment(), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    ask = {"model": "default_model", "max_tokens": 8, "temperature": 0}
    turns = [{"role": "user", "content": PROMPT}]
    try:
        first = when_up(server, lambda: client.chat.completions.create(messages=turns, **ask))
        answer = first.choices[0].message.content
        assert answer and first.usage.completion_tokens <= 8
        streamed = client.chat.completions.create(messages=turns, stream=True, **ask)
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        assert "".join(pieces) == answer
        turns += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "and subtract"},
        ]
        second = client.chat.completions.create(messages=turns, **ask)
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert cached >= first.usage.prompt_tokens - 4
        assert second.usage.prompt_tokens > first.usage.prompt_tokens
        for limits in ({"max_tokens": 8192}, {"temperature": 1.0, "seed": 1, "max_tokens": 8192}):
            with pytest.raises(openai.APIStatusError) as refused:
                client.chat.completions.create(messages=turns, **ask | limits)
            assert "and 8192 more (max_tokens) exceed" in refused.value.response.text
        assert client.chat.completions.create(messages=turns, **ask).choices  # it goes on
        trained = client.completions.create(
            model="model", prompt=PROMPT, max_tokens=8, temperature=0,
            extra_body={"adapters": str(adapter)},
        )  # fmt: skip
        assert trained.choices[0].text.strip() == "a + b"
    finally:
        server.terminate()
        server.wait(30)


def when_up(server: subprocess.Popen, request):
    """The reply, once the server listens."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return request()
        except openai.APIConnectionError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_a_server_without_its_model_ends(folder):
    path = damaged(folder, "truncated") if not (folder / "truncated").exists() else "truncated"
    done = subprocess.run(
        command("server", "--model", str(path), "--port", str(free_port())),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    # At the same time mlx-lm's main thread says where it listens.
    assert done.returncode == 2
    assert re.search(r"error: \[safetensors\] .*truncated", done.stderr)
    assert "Traceback" not in done.stderr
