"""lm-evaluation-harness asks the server, as its own command does, and gets the model's numbers."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from served import served

from glm_fused import Engine
from glm_fused.checkpoint.paths import bundled_folder

pytest.importorskip("lm_eval", reason="needs glm-fused[evaluate]")

QUESTIONS = [
    {"q": "import", "choices": [" os", " zebra"], "answer": 0},
    {"q": "def f(x):\n    return", "choices": [" import", " x"], "answer": 1},
    {"q": "for i in", "choices": [" range", " else", " class"], "answer": 0},
]
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "target_delimiter": "",
}
TASKS = {
    "choices": COMMON
    | {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": COMMON
    | {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def engine():
    with Engine("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tasks and their data, which others would be downloaded into."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines)
    files = {"dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | task | files))
    return folder


def evaluate(server, folder, model, path, tasks, *more):
    """The samples of each task, by its name.

    It runs in a process of its own, since it brings thread pools of other libraries.
    """
    arguments = f"model=demo,base_url={server.url}{path},num_concurrent=1,max_retries=1"
    arguments += f",tokenizer={bundled_folder()}"
    out = folder / model
    command = [
        sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks",
        ",".join(tasks), "--include_path", folder, "--output_path", out, "--log_samples", *more,
    ]  # fmt: skip
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    run = subprocess.run(
        command, env=os.environ | quiet, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = {}
    for task in tasks:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return found


def test_completions_are_scored_and_generated(engine, folder):
    with served(engine) as server:
        arguments = ("local-completions", "/v1/completions", ["choices", "texts"])
        samples = evaluate(server, folder, *arguments, "--batch_size", "2")
    for sample, question in zip(samples["choices"], QUESTIONS, strict=True):
        assert sample["acc"] == 1.0
        for given, choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            likelihood, greedy = likelihood_of(engine, question["q"], choice)
            assert float(given[0]) == pytest.approx(likelihood, rel=1e-5)
            assert str(given[1]) == str(greedy)
    for sample, question in zip(samples["texts"], QUESTIONS, strict=True):
        expected = engine.generate(question["q"], raw=True, max_tokens=12, temp=0, stop=["\n\n"])
        assert sample["resps"] == [[expected.text]] and expected.text


def likelihood_of(engine, context, choice):
    """A choice's log-likelihood after its context, and whether it is what greedy decoding gives."""
    first = len(engine.encode(context, raw=True))
    tokens = engine.encode(context + choice, raw=True)
    logits = engine.step(mx.array([tokens]))[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    rows = [found[i - 1] for i in range(first, len(tokens))]
    values = [row[token].item() for row, token in zip(rows, tokens[first:], strict=True)]
    greedy = [row.max().item() for row in rows]
    return sum(values), values == greedy


@pytest.mark.slow
def test_chats_are_generated(engine, folder):
    with served(engine) as server:
        arguments = ("local-chat-completions", "/v1/chat/completions", ["texts"])
        samples = evaluate(server, folder, *arguments, "--apply_chat_template")
    for sample, question in zip(samples["texts"], QUESTIONS, strict=True):
        turn = [{"role": "user", "content": question["q"]}]
        expected = engine.generate(turn, max_tokens=12, temp=0, stop=["\n\n"])
        assert sample["resps"] == [[expected.text]] and expected.text
