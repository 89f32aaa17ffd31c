"""`glm-fused replay` refuses damaged traces, or gives the rates of a plain simulation."""

import json
import random
from collections import OrderedDict
from contextlib import contextmanager
from unittest import mock

from tests.adversarial.harness import Wrong, command_outcome
from tests.adversarial.kinds import _command, _json

from glm_fused.streaming import trace as reader
from glm_fused.streaming.replay import replay

NAME = "trace"
SLOW_CASES = 15_000
EXPERTS, TOP_K, LAYERS = 12, 2, (1, 2, 5)
POLICIES = ("lru", "learned", "s3fifo", "pinned")


def prepare(folder):
    """Nothing is needed, as each case makes its own trace."""


def lines(rng):
    """The entries of a good trace: decode requests, and a prompt taken in waves."""
    header = {
        "experts": EXPERTS,
        "top_k": TOP_K,
        "expert_bytes": {str(layer): 1000 * layer for layer in LAYERS},
        "slots": 4,
    }
    result = [header]
    for token in range(rng.randrange(1, 12)):
        for layer in LAYERS:
            rows = [rng.sample(range(EXPERTS), TOP_K) for _ in range(rng.choice([1, 1, 1, 4]))]
            if rng.random() < 0.2:
                rows = [[expert] for row in rows for expert in row]
            result.append({"layer": layer, "token": token, "experts": rows, "hits": 1})
    return result


def damage(rng, entries):
    """The bytes of a file of these entries, often with some damage."""
    texts = [json.dumps(entry) for entry in entries]
    kind = rng.randrange(6)
    if kind == 0:
        return "\n".join(texts).encode()
    if kind == 1:
        return _json.damaged_bytes(rng, "\n".join(texts).encode())
    if kind == 2:
        texts.insert(rng.randrange(len(texts) + 1), rng.choice([texts[0], "", "null", "{}", "[]"]))
    else:
        for _ in range(rng.choice([1, 1, 2])):
            at = 0 if rng.random() < 0.4 else rng.randrange(len(texts))
            texts[at] = _json.damaged(rng, entries[at])[0]
    return "\n".join(texts).encode(errors="surrogatepass")


def lru_rate(content, slots):
    """The hit rate of LRU banks, from the file itself; raises `Wrong` if it is no trace."""
    header, *requests = [json.loads(line) for line in content.splitlines() if line.strip()]
    banks, hits, total = {}, 0, 0
    for request in requests:
        bank = banks.setdefault(request["layer"], OrderedDict())
        experts = list(dict.fromkeys(e for row in request["experts"] for e in row))
        known = all(type(e) is int and 0 <= e < header["experts"] for e in experts)
        if not experts or not known or str(request["layer"]) not in header["expert_bytes"]:
            raise Wrong(f"a request was accepted: {request}")
        step = len(experts) if len(experts) <= slots else max(1, slots // 2)
        for wave in (experts[i : i + step] for i in range(0, len(experts), step)):
            total += len(wave)
            hits += sum(expert in bank for expert in wave)
            for expert in (e for e in wave if e in bank):
                bank.move_to_end(expert)
            for expert in (e for e in wave if e not in bank):
                if len(bank) == slots:
                    del bank[next(e for e in bank if e not in wave)]
                bank[expert] = None
    return hits / total


def rates_of(path, slots, through_command):
    """The hit rates by policy, through the command line or from the functions below it."""
    if not through_command:
        rows = replay(reader.read_trace(path), [slots], POLICIES)["rows"]
    else:
        command = ("replay", path, "--bank", slots, "--policy", ",".join(POLICIES), "--json")
        code, out, err = _command.run(*command)
        command_outcome(code, out, err)
        if code:
            raise ValueError(err.strip())
        rows = json.loads(out)["rows"]
    return {row["policy"]: row["hit_rate"] for row in rows}


def case(seed, folder):
    """Replay one trace."""
    rng = random.Random(seed)
    content = damage(rng, lines(rng))
    path = folder / "trace.jsonl"
    path.write_bytes(content)
    slots = rng.randrange(TOP_K, EXPERTS + 1)
    try:
        rates = rates_of(path, slots, seed % 8 == 0)
    except ValueError as error:
        if str(path) not in str(error) and "a bank of" not in str(error):
            raise Wrong(f"the error does not name the file: {error}") from error
        raise
    if rates["lru"] != lru_rate(content, slots):
        raise Wrong(f"lru: {rates['lru']}, expected {lru_rate(content, slots)}")
    if max(rates.values()) > rates["optimum"]:
        raise Wrong(f"better than the optimum: {rates}")
    return "right"


@contextmanager
def planted():
    """Numbers of the header are taken as they come."""
    with mock.patch.object(reader, "_integer", lambda entry, key, where, high: entry[key]):
        yield
