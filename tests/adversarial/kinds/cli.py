"""Random command lines give the right tokens and exit code 0, or exit code 2 and one line."""

import argparse
import json
import random
import tempfile
from contextlib import chdir, contextmanager
from unittest import mock

from tests.adversarial.harness import Unclear, Wrong
from tests.adversarial.kinds import _command, _model

from glm_fused import cli, set_num_threads
from glm_fused.cli import arguments
from glm_fused.generation.generate import generate
from glm_fused.generation.options import Options
from glm_fused.generation.prompts import encode
from glm_fused.loader import load

NAME = "cli"
SLOW_CASES = 1000
QUICK_CASES = 60
TIMEOUT = 120.0
PROMPTS = ("w1 w2 w3", "w9 w250 w4 w7 w7", " ".join(f"w{i}" for i in range(40)))
MAX_TOKENS = 6
WORDS = [
    "", "0", "1", "2", "3", "8", "-1", "1.5", "1e400", "-1e400", "1e-300", "nan", "inf", "0x10",
    "1_0", "9" * 400, "9" * 5000, str(2**31), str(2**63), str(2**64), "٣", "²", " 4", "auto",
    "none", "é", "\udcff", "a\nb", "x" * 300, "-", "--", "/", "/dev/null", "/proc/self/mem", ".",
    "~", "~nobody/x", "24", "24GB", "1MiB", "4096", "300MB", "1e3GB", "9" * 400 + "GB", "0GB",
    "4KiB", "cpu", "lru", "pinned", "learned,lru", "bf16", "int8", "zai-org/GLM-5.2", "a/b/c",
]  # fmt: skip
# They measure, or run both paths, for seconds; serve waits for requests.
LEFT_OUT = {"selftest", "doctor", "demo", "profile", "serve"}


def prepare(folder):
    """Make a checkpoint, files for options that take one, and the greedy tokens of every prompt."""
    good = _model.write(folder / "good")
    model, tokenizer = load(good)
    prepare.tokens = {}
    for prompt in PROMPTS:
        tokens = encode(model, tokenizer, prompt)
        options = Options(max_tokens=MAX_TOKENS)
        prepare.tokens[prompt] = generate(model, tokenizer, tokens, options).tokens
    (folder / "pins.json").write_text('{"1": [3, 4]}')
    (folder / "bad.json").write_text('{"9": [99]}')
    (folder / "cut.jsonl").write_text('{"experts": 8, "top_k": 2, "expert_bytes": {"1": 9}}\n{')
    requests = "".join(
        f'{{"layer": 1, "experts": [[{i % 8}, {(i + 3) % 8}]]}}\n' for i in range(20)
    )
    trace = '{"experts": 8, "top_k": 2, "expert_bytes": {"1": 10}}\n' + requests
    (folder / "trace.jsonl").write_text(trace)


def parsers(parser, words=()):
    """Yield the words and the parser of every command."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in found:
        for name, inner in action.choices.items():
            yield from parsers(inner, (*words, name))
    if not found:
        yield words, parser


def value(rng, folder, action):
    """A value of an option or an argument, often a sensible one."""
    files = ["good", "pins.json", "bad.json", "trace.jsonl", "cut.jsonl", "none", "sidecar"]
    if action.choices and rng.random() < 0.9:
        return rng.choice(list(action.choices))
    if rng.random() < 0.12:
        return rng.choice(WORDS)
    name = action.dest
    if name in ("max_tokens", "slots", "lookahead", "context", "read_depth", "threads", "seed"):
        return rng.choice(["1", "2", "4", "5", "6", "8"])
    if name in ("temp", "top_p", "compute_ms") or action.type is not None:
        return rng.choice(["0", "0.5", "1", "1e-300", "3"])
    if name in ("memory_budget", "read_split", "read_rate"):
        return rng.choice(["2GB", "64KiB", "1MiB", "auto", "700MB"])
    if name == "prompt":
        return rng.choice(PROMPTS)
    if name in ("trace", "plot", "json") and rng.random() < 0.5:
        return str(folder / rng.choice(["out.jsonl", "out.png"]))
    return str(folder / rng.choice(files))


def command_line(rng, folder, words, parser):
    """A random list of arguments."""
    line = list(words)
    if words == ("generate",) and rng.random() < 0.9:
        line += ["--model", str(folder / "good"), "--prompt", rng.choice(PROMPTS)]
    options = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    for action in rng.sample(options, min(len(options), rng.choice([0, 1, 1, 2, 3, 5]))):
        if action.dest in ("model", "prompt") and rng.random() < 0.7:
            continue
        flag = rng.choice(action.option_strings)
        if rng.random() < 0.03:
            flag = flag[: rng.randrange(3, len(flag) + 1)]
        if action.nargs == 0:
            line.append(flag)
        elif rng.random() < 0.2:
            line.append(f"{flag}={value(rng, folder, action)}")
        else:
            line += [flag, value(rng, folder, action)]
    for action in parser._actions:
        if not action.option_strings and rng.random() < 0.95:
            line.append(value(rng, folder, action))
    if rng.random() < 0.05:
        line.insert(
            rng.randrange(len(line) + 1), rng.choice([*WORDS, "--nonsense", "-h", "--version"])
        )
    return short(line)


def short(line):
    """The line with a limit on what is generated, and without what goes on for seconds."""
    if line[:1] in (["generate"], ["demo"]) and "--max-tokens" not in " ".join(line):
        line += ["--max-tokens", str(MAX_TOKENS)]
    for i, word in enumerate(line):
        name, _, number = word.rpartition("=") if "=" in word else (line[i - 1], "", word)
        plain = number.isascii() and number.isdecimal()
        if name == "--max-tokens" and plain and MAX_TOKENS < int(number[:20]) < 2**31:
            line[i] = word.removesuffix(number) + str(MAX_TOKENS)
    return line


def check(line, out, good):
    """Raise Wrong for tokens that a greedy run of this prompt does not give."""
    options = cli._parser().parse_args(line)
    if line[0] != "generate" or not options.json or options.prompt not in PROMPTS:
        return
    other = ("temp", "ab", "repetition_penalty", "stop")
    if options.model != good or any(getattr(options, name, None) for name in other):
        return
    if options.kv_format not in ("auto", "bf16"):
        return
    tokens = json.loads(out)["tokens"]
    expected = prepare.tokens[options.prompt][: options.max_tokens]
    if tokens[: len(expected)] != expected:
        raise Wrong(f"{line}: {tokens}, expected {expected}")


def case(seed, folder):
    """Run one command line."""
    rng = random.Random(seed)
    commands = [c for c in parsers(cli._parser()) if c[0][0] not in LEFT_OUT]
    weights = [6 if words[0] in ("generate", "replay") else 1 for words, _ in commands]
    words, parser = rng.choices(commands, weights)[0]
    line = command_line(rng, folder, words, parser)
    set_num_threads(2)  # the case before may have asked for another number
    stdin = rng.choice(["w1 w2", ""])
    with tempfile.TemporaryDirectory() as here, chdir(here):  # a word may name a file to write
        code, out, err = _command.run(*line, stdin=stdin)
    if code in (0, 1):
        if code == 0 and out and "-h" not in line and "--version" not in line:
            check(line, out, str(folder / "good"))
        return "right"
    lines = err.strip().splitlines()
    if code != 2 or not lines or not lines[-1].startswith("glm-fused: error: "):
        raise Unclear(f"{line}: exit code {code}: {err[-300:]!r}")
    errors = [text for text in lines if "error" in text]
    if len(errors) != 1 or len(lines[-1]) > 1000:
        raise Unclear(f"{line}: {err[-600:]!r}")
    return f"error: {lines[-1]}"


@contextmanager
def planted():
    """Nobody minds that a text is no number."""
    with mock.patch.object(arguments, "show", lambda text: 1 / 0):
        yield
