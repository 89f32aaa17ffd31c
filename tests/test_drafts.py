"""Drafts change no token and no logit, whatever was guessed and however much of it stays."""

import json
import random

import mlx.core as mx
import pytest
from test_cli import run as run_command

from glm_fused import Engine, EngineOptions
from glm_fused.generation.decoding import Decoding, Drafting
from glm_fused.generation.drafts.depth import BURST, Depth
from glm_fused.generation.drafts.drafter import MATCHES, Drafter, Kind
from glm_fused.generation.drafts.lookup import LONGEST, SHORTEST, LookupDrafter
from glm_fused.generation.options import Options

CODE = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
TOKENS = 40
KIND = Kind("planted")
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


class Planted(Drafter):
    """Guesses what it was given, but for some tokens that it changes."""

    def __init__(self, text, right=0.7, seed=0):
        self._text, self._right, self._random = text, right, random.Random(seed)

    def start(self, prompt, cached=0):
        self._at = len(prompt)

    def extend(self, tokens, hidden):
        self._at += len(tokens)

    def kinds(self):
        return [KIND]

    def propose(self, kind, depth, draw):
        guess = (self._text + [0] * depth)[self._at : self._at + depth]
        wrong = [(token + 1) % 2048 for token in guess]
        pairs = zip(guess, wrong, strict=True)
        return mx.array(
            [a if self._random.random() < self._right else b for a, b in pairs], mx.uint32
        )


@pytest.fixture(scope="module")
def engine():
    with Engine("demo") as engine:
        yield engine


def decode(model, prompt, drafting=None, tokens=TOKENS, **options):
    """The tokens, and the bits of the logits that each was chosen from."""
    options = Options(max_tokens=tokens, **options)
    decoding = Decoding(model, prompt, options, model.make_cache(), 16, drafting)
    steps = list(decoding.steps())
    mx.eval([step.logits for step in steps])
    rows = [step.logits[step.row] for step in steps]
    return [s.token for s in steps], [r.view(BITS[r.dtype.size]) for r in rows], decoding


def same(a, b):
    """Whether tokens and bits are the same."""
    return a[0] == b[0] and all(mx.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def kept(decoding):
    return decoding.statistics.describe(None)["accepted"]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7, 8, "auto"])
def test_tokens_and_logits_are_those_without_drafts(engine, depth):
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    plain = decode(model, prompt)
    for seed in range(2):
        planted = Planted(prompt + plain[0], 0.7, seed)
        drafted = decode(model, prompt, Drafting(planted, Depth(depth)))
        assert same(drafted, plain)
        assert depth == "auto" or kept(drafted[2]) > 0
    assert same(decode(model, prompt, Drafting(LookupDrafter(), Depth(depth))), plain)


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "fp8", "int8"])
def test_every_kind_of_cache(kv_format):
    with Engine("demo", EngineOptions(kv_format=kv_format)) as engine:
        check(engine, 5)


@pytest.mark.parametrize("slots", [4, 9])
def test_streamed_experts(slots):
    with Engine("demo", EngineOptions(slots=slots)) as engine:
        check(engine, 3)


def check(engine, depth):
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    plain = decode(model, prompt)
    drafted = decode(model, prompt, Drafting(Planted(prompt + plain[0]), Depth(depth)))
    assert same(drafted, plain)
    assert kept(drafted[2]) > 0


def test_a_repetition_penalty_sees_the_drafts_before(engine):
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    penalty = {"repetition_penalty": 1.5, "repetition_context_size": 7}
    plain = decode(model, prompt, **penalty)
    assert plain[0] != decode(model, prompt)[0]
    drafted = decode(model, prompt, Drafting(Planted(prompt + plain[0]), Depth(4)), **penalty)
    assert same(drafted, plain)
    assert kept(drafted[2]) > 0


@pytest.mark.parametrize("fault", ["trim", "accept", "count"])
def test_planted_faults_are_found(engine, monkeypatch, fault):
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    plain = decode(model, prompt)
    trim = Decoding._trim
    if fault == "trim":  # one row stays
        monkeypatch.setattr(Decoding, "_trim", lambda self, n: trim(self, n - 1))
    elif fault == "count":  # one row too many goes
        monkeypatch.setattr(Decoding, "_trim", lambda self, n: trim(self, n + 1))
    else:
        from glm_fused.generation.choice import Choice

        judge = Choice.judge

        def wrong(self, logits, draft):
            chosen = judge(self, logits, draft)
            return mx.concatenate([draft[:1], chosen[1:]])

        monkeypatch.setattr(Choice, "judge", wrong)
    drafted = decode(model, prompt, Drafting(Planted(prompt + plain[0]), Depth(4)))
    assert not same(drafted, plain)


def test_a_stop_token_inside_a_draft(engine, monkeypatch):
    """What was kept after it is neither in the text nor in the cache."""
    prompt = engine.encode(CODE, raw=True)
    plain = engine.generate(prompt, max_tokens=TOKENS).tokens
    last = next(i for i in range(BURST + 4, TOKENS) if plain[i] not in plain[:i])
    monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", {plain[last]})
    for depth in (4, 7):
        decoded = engine.generate(prompt, max_tokens=TOKENS)
        planted = Drafting(Planted(prompt + plain, 1.0), Depth(depth))
        monkeypatch.setattr(Drafting, "of", lambda *_, planted=planted: planted)
        drafted = engine.generate(prompt, max_tokens=TOKENS)
        monkeypatch.undo()
        monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", {plain[last]})
        assert drafted.tokens == decoded.tokens == plain[: last + 1]
        assert (drafted.text, drafted.finish_reason) == (decoded.text, "stop")
        assert drafted.kv_tokens <= len(prompt) + last + 1


def test_drafts_end_with_the_context(engine, monkeypatch):
    """No step is longer than the context has room for."""
    model, prompt = engine.model, engine.encode(CODE, raw=True)
    plain = decode(model, prompt)
    monkeypatch.setattr(model.model, "_context", len(prompt) + TOKENS - 1)
    drafting = Drafting(Planted(prompt + plain[0], 1.0), Depth(8))
    assert same(decode(model, prompt, drafting), plain)
    monkeypatch.setattr(model.model, "_context", len(prompt) + TOKENS - 2)
    with pytest.raises(ValueError, match="context"):
        decode(model, prompt)


@pytest.mark.parametrize("source", ["mtp", "lookup"])
def test_generate_with_drafts(engine, source):
    prompt = engine.encode(CODE * 2, raw=True)
    plain = engine.generate(prompt, max_tokens=60)
    with Engine("demo", EngineOptions(draft=3, draft_from=source)) as drafting:
        pieces = list(drafting.stream(prompt, max_tokens=60))
        drafted = drafting.generate(prompt, max_tokens=60)
    assert plain.drafts is None
    assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
    assert [piece.token for piece in pieces] == plain.tokens
    assert drafted.drafts is not None
    found = drafted.drafts
    assert (found["depth"], found["source"]) == (3, source)
    assert 0 < found["accepted"] <= found["proposed"] <= 3 * found["rounds"]
    assert found["tokens_per_step"] > 1
    assert found["gain"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": 9}, r"\[drafts\] depth is 9, expected an integer from 1 to 8 or 'auto'"),
        ({"draft": True}, "depth is True"),
        ({"draft": "on"}, "depth is 'on'"),
        ({"draft_from": "lookup"}, "draft_from: needs draft"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


def test_the_command_line(capsys):
    def run(*args):
        prompt = ("--prompt", CODE * 2, "--raw", "--max-tokens", "40")
        return run_command(capsys, "generate", "--model", "demo", *prompt, *args)

    plain = json.loads(run("--json")[1])
    code, out, _ = run("--draft", "2", "--json")
    found = json.loads(out)
    assert (code, plain["drafts"]) == (0, None)
    assert found["tokens"] == plain["tokens"]
    assert 0 < found["drafts"]["accepted"] <= found["drafts"]["proposed"]
    code, out, err = run("--draft", "auto", "--draft-from", "lookup", "--verbose")
    assert out == plain["text"] + "\n"
    assert "drafts      auto from lookup, " in err
    code, out, _ = run("--draft", "3", "--ab")
    assert code == 0
    assert "bit-identical: yes" in out
    depths = "expected auto, off or an integer from 1 to 8"
    for wrong, message in ((("--draft", "0"), depths), (("--draft-from", "x"), "needs --draft")):
        code, _, err = run(*wrong)
        assert code == 2
        assert message in err


@pytest.mark.parametrize("seed", range(5))
def test_lookup_finds_the_latest_longest_match(seed):
    """An index that grows with the text finds what a search through the text does."""
    text, drafter = random.Random(seed).choices(range(4), k=120), LookupDrafter()
    drafter.start(text[:20])
    for at in range(20, len(text)):
        found = searched(text[:at])
        kinds = drafter.kinds()
        assert len(kinds) == (found is not None)
        if found is not None:
            guess = drafter.propose(kinds[0], 6, None).tolist()
            assert guess == goes_on(text[:at], found, 6)
            same = same_before(text[:at], found)
            assert kinds[0].match == max(m for m in MATCHES if m <= same)
        drafter.extend([text[at]], None)


def searched(text):
    for length in range(LONGEST, SHORTEST - 1, -1):
        for at in range(len(text) - 1, length - 1, -1):
            if text[at - length : at] == text[-length:]:
                return at
    return None


def same_before(text, at):
    """How many tokens before a place are the last ones of the text."""
    return next((n for n in range(at) if text[at - 1 - n] != text[-1 - n]), at)


def goes_on(text, at, count):
    for i in range(count):
        text = [*text, text[at + i]]
    return text[-count:]


def simulated(rates, costs, tokens=4000, seed=0):
    """How many times as fast as plain steps `auto` is, where each draft stays with such a rate."""
    depth, rng, done, seconds = Depth("auto"), random.Random(seed), 0, 0.0
    while done < tokens:
        plan = depth.next([KIND], 8)
        count = plan.depth if plan else 0
        cost = costs[count] * rng.uniform(0.9, 1.2)
        if plan:
            kept = next((i for i in range(count) if rng.random() >= rates[i]), count)
            depth.count(plan, kept, cost)
            done += kept
        else:
            depth.count_plain(cost)
        done += 1
        seconds += cost
    return done * costs[0] * 1.05 / seconds


@pytest.mark.parametrize("slope", [0.1, 0.3, 0.9, 3.0])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_auto_comes_close_to_the_best_depth(rate, slope):
    costs = [1 + slope * (depth > 0) + slope * depth / 4 for depth in range(9)]
    rates = [rate] * 8
    expected = [sum(rate**i for i in range(depth + 1)) / costs[depth] for depth in range(9)]
    assert simulated(rates, costs) > max(expected) * (0.97 if max(expected) == 1 else 0.8)


def test_auto_takes_the_kind_that_pays():
    """Look-up costs less here, but hardly any of it stays where little is the same."""
    kinds = [Kind("lookup", 2), Kind("lookup", 4), Kind("mtp")]
    rates, free = {kinds[0]: 0.1, kinds[1]: 0.95, kinds[2]: 0.8}, {"lookup": 0.0, "mtp": 0.15}
    depth, rng, made = Depth("auto"), random.Random(0), []
    for i in range(1200):
        plan = depth.next(kinds[:1] + kinds[2:] if i % 2 else kinds, 8)
        if plan is None:
            depth.count_plain(1.0)
            continue
        rate, made = rates[plan.kind], [*made, plan.kind]
        kept = next((i for i in range(plan.depth) if rng.random() >= rate), plan.depth)
        depth.count(plan, kept, 1 + (0.2 + free[plan.kind.source]) * plan.depth)
    counts = [made[-600:].count(kind) / 600 for kind in kinds]
    assert counts[0] < 0.03 and counts[1] > 0.4 and counts[2] > 0.4


def test_auto_notices_that_a_text_begins_to_suit():
    depth = Depth("auto")
    costs = [1, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    made = []
    for i in range(1500):
        plan = depth.next([KIND], 8)
        count = plan.depth if plan else 0
        if plan:
            kept = count if i > 1000 else 0
            depth.count(plan, kept, costs[count])
        else:
            depth.count_plain(costs[0])
        made.append(count)
    assert sum(costs[count] - 1 for count in made[100:1000]) < 0.02 * 900
    assert any(made[100:1000])
    assert made[-1] == 7
