"""Several texts at once have the tokens and logits that each has alone, with drafts and without."""

from collections import defaultdict

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from test_drafts import BITS, CODE, Planted, decode
from test_generate import write_tokenizer

from glm_fused import Engine, EngineOptions
from glm_fused.generation.batching import microbatches
from glm_fused.generation.batching.batch import Batch
from glm_fused.generation.batching.batches import generate_batch
from glm_fused.generation.batching.rows import Row
from glm_fused.generation.drafts.options import DraftOptions
from glm_fused.generation.drafts.rows import EachRow, MtpRows
from glm_fused.generation.options import Options
from glm_fused.models.cache import trim
from glm_fused.models.row_caches import side_by_side

TOKENS = 24
TEXTS = [CODE, "def add(a, b):\n    return", CODE * 3, "class Tree:\n    def __init__(self, "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    write_checkpoint(folder, tiny_config(), quantization={"group_size": 32, "bits": 4}, mtp=True)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """The bits of the logits that tokens were chosen from, by the prompts of their texts."""
    found, take = defaultdict(list), Row._take

    def record(self, token, logits, at):
        found[tuple(self.known[: self.prompt_tokens])].append(
            logits[at].view(BITS[logits.dtype.size])
        )
        take(self, token, logits, at)

    monkeypatch.setattr(Row, "_take", record)
    monkeypatch.setattr(Row, "needs_logits", True)  # so that it is given them
    return found


def check(engine, prompts, drafts, recorded, **options):
    alone = [decode(engine.model, prompt, tokens=TOKENS, **options) for prompt in prompts]
    recorded.clear()
    options = Options(max_tokens=TOKENS, **options)
    found = generate_batch(engine.model, engine.tokenizer, prompts, options, drafts)
    for prompt, answer, (tokens, logits, _) in zip(prompts, found.answers, alone, strict=True):
        rows = recorded[tuple(prompt)]
        assert answer.tokens == up_to_its_end(engine, tokens)
        for a, b in zip(rows, logits[: len(answer.tokens)], strict=True):
            assert mx.array_equal(a, b)
    return found


def up_to_its_end(engine, tokens):
    ends = [i for i, token in enumerate(tokens) if token in engine.tokenizer.eos_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def planted(monkeypatch, prompts, texts, rates):
    """Have drafts be right so often, for each text another rate."""
    drafters = [
        Planted(prompt + text, rate, seed)
        for seed, (prompt, text, rate) in enumerate(zip(prompts, texts, rates, strict=True))
    ]
    monkeypatch.setattr(DraftOptions, "row_drafts", lambda *_: EachRow(drafters))


@pytest.mark.parametrize("depth", [0, 1, 2, 3, "auto"])
def test_batches_of_the_bundled_model(engine, monkeypatch, recorded, depth):
    prompts = [engine.encode(text, raw=True) for text in TEXTS]
    if not depth:
        check(engine, prompts, None, recorded)
        return
    texts = [decode(engine.model, prompt, tokens=TOKENS)[0] for prompt in prompts]
    with monkeypatch.context() as patch:
        planted(patch, prompts, texts, (0.6, 0.8, 0.9, 1.0))
        found = check(engine, prompts, DraftOptions(depth), recorded)
        assert depth == "auto" or found.drafts["accepted"] > 0
    check(engine, prompts, DraftOptions(depth), recorded, repetition_penalty=1.3)


def test_a_single_text_and_none(engine, recorded):
    check(engine, [engine.encode(CODE, raw=True)], DraftOptions(8), recorded)
    with pytest.raises(ValueError, match="no prompts"):
        engine.generate_batch([])
    with pytest.raises(ValueError, match="no such option"):
        engine.generate_batch([CODE], luck=1)


@pytest.mark.parametrize("options", [{}, {"slots": 3}, {"kv_format": "fp8"}], ids=str)
def test_batches_with_the_mtp_layer(folder, monkeypatch, recorded, options):
    prompts = [list(range(3, 3 + n)) for n in (21, 5, 40)]
    with Engine(folder, EngineOptions(draft=3, **options)) as engine:
        texts = [decode(engine.model, prompt, tokens=TOKENS)[0] for prompt in prompts]
        check(engine, prompts, engine.drafts, recorded)
        check_rows(engine, monkeypatch, recorded, prompts, texts)


def check_rows(engine, monkeypatch, recorded, prompts, texts):
    """Drafts are planted, and the layer's cache has to hold what each text alone puts into it."""
    made = []

    class PlantedRows(MtpRows):
        def __init__(self, padding):
            super().__init__(engine.model, padding)
            pairs = zip(prompts, texts, (0.3, 0.6, 1.0), strict=True)
            self.planted = EachRow([Planted(a + b, rate) for a, b, rate in pairs])
            made.append(self)

        def start(self, texts):
            self.planted.start(texts)

        def propose(self, ahead, depth, draws):
            own = super().propose(ahead, depth, draws)
            return mx.depends(self.planted.propose(ahead, depth, draws) % 256, own)

        def extend(self, new, following, hidden):
            super().extend(new, following, hidden)
            self.planted.extend(new, following, hidden)

        def filter(self, stay):
            """Nothing: the test looks at all rows."""

    monkeypatch.setattr(DraftOptions, "row_drafts", lambda *given: PlantedRows(given[2]))
    monkeypatch.setattr(Batch, "leave", leave_together)
    found = check(engine, prompts, engine.drafts, recorded)
    assert found.drafts["accepted"] > 0
    (rows,) = made
    padding = rows._cache[0].left_padding.tolist()
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        tokens = mx.array([prompt + text])
        _, hidden = engine.model.states(tokens[:, :-1], engine.model.make_cache())
        alone = engine.model.make_mtp_cache()
        engine.model.draft(tokens[:, 1:], hidden, alone)
        for a, b in zip(rows._cache.caches, alone.caches, strict=True):
            count = min(a._idx - padding[i], b.offset)
            assert count > len(prompt)
            found = a.keys[i : i + 1, :, padding[i] : padding[i] + count]
            bits = BITS[found.dtype.size]
            assert mx.array_equal(found.view(bits), b.keys[:, :, :count].view(bits))


def leave_together(batch, rows):
    """Texts stay until all have ended."""
    if len(rows) == len(batch.rows):
        batch.rows = []


def test_texts_that_end_leave_the_batch(engine, monkeypatch):
    prompts = [engine.encode(text, raw=True) for text in TEXTS]
    alone = [engine.generate(prompt, max_tokens=TOKENS).tokens for prompt in prompts]
    ends = {alone[0][3], alone[1][9]}
    monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", ends)
    expected = [engine.generate(prompt, max_tokens=TOKENS) for prompt in prompts]
    assert len({len(completion.tokens) for completion in expected}) > 1
    planted(monkeypatch, prompts, alone, (0.9, 0.2, 0.9, 0.9))
    found = generate_batch(
        engine.model, engine.tokenizer, prompts, Options(max_tokens=TOKENS), DraftOptions(3)
    )
    for answer, completion in zip(found.answers, expected, strict=True):
        assert (answer.tokens, answer.text) == (completion.tokens, completion.text)
        assert answer.finish_reason == completion.finish_reason


def in_turns(engine, monkeypatch, recorded, count, **options):
    """Texts in several batches; those of one end before the others."""
    prompts = [engine.encode(text, raw=True) for text in TEXTS]
    texts = [decode(engine.model, prompt, tokens=TOKENS, **options)[0] for prompt in prompts]
    ends = {text[at] for text, at in zip(texts[1::count], (5, 8), strict=False)}
    monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", ends)
    monkeypatch.setattr(microbatches, "turns_of", lambda model: count)
    return check(engine, prompts, None, recorded, **options)


@pytest.mark.parametrize(("count", "options"), [(2, {}), (3, {"temp": 1.0, "seed": 5})], ids=str)
def test_batches_that_take_turns(engine, monkeypatch, recorded, count, options):
    """A batch whose texts have ended takes over some of another's."""
    joined, join = [], Batch.join

    def counted(batch, rows, *others):
        joined.append([len(row.known) - row.prompt_tokens for row in rows])
        join(batch, rows, *others)

    monkeypatch.setattr(Batch, "join", counted)
    found = in_turns(engine, monkeypatch, recorded, count, **options)
    assert len({len(answer.tokens) for answer in found.answers}) > 1
    assert not any(map(any, joined[:count])) and joined[count:] and all(map(all, joined[count:]))


def test_a_text_that_changes_batches_with_another_cache_is_noticed(engine, monkeypatch, recorded):
    def shorter(layers, padding):
        trim(layers, 1)
        return side_by_side(layers, padding)

    monkeypatch.setattr(microbatches, "side_by_side", shorter)
    with pytest.raises(AssertionError):
        in_turns(engine, monkeypatch, recorded, 2)


def test_drafts_end_with_the_context(engine, monkeypatch, recorded):
    """No step is longer than the context has room for, of the longest text."""
    prompts = [engine.encode(text, raw=True) for text in TEXTS]
    texts = [decode(engine.model, prompt, tokens=TOKENS)[0] for prompt in prompts]
    planted(monkeypatch, prompts, texts, (1.0, 1.0, 1.0, 1.0))
    monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", set())
    longest = max(map(len, prompts))
    monkeypatch.setattr(engine.model.model, "_context", longest + TOKENS - 1)
    check(engine, prompts, DraftOptions(3), recorded)
    monkeypatch.setattr(engine.model.model, "_context", longest + TOKENS - 2)
    with pytest.raises(ValueError, match="context"):
        check(engine, prompts, DraftOptions(3), recorded)


@pytest.mark.parametrize("fault", [1, -1])
def test_a_planted_fault_is_found(engine, monkeypatch, recorded, fault):
    from glm_fused.generation.batching import batch

    prompts = [engine.encode(text, raw=True) for text in TEXTS]
    texts = [decode(engine.model, prompt, tokens=TOKENS)[0] for prompt in prompts]
    planted(monkeypatch, prompts, texts, (0.5, 0.5, 0.8, 1.0))
    trim = batch.trim
    monkeypatch.setattr(batch, "trim", lambda cache, n: trim(cache, max(n + fault, 0)))
    with pytest.raises(AssertionError):
        check(engine, prompts, DraftOptions(3), recorded)


@pytest.mark.parametrize("draft", ["off", 3])
def test_sampled_texts(engine, draft):
    """A seed draws for each what it draws for it alone, without drafts."""
    options = {"max_tokens": 12, "temp": 0.8, "top_k": 40, "raw": True, "seed": 5}
    expected = [engine.generate(text, **options).tokens for text in TEXTS]
    with Engine("demo", EngineOptions(draft=draft)) as drafting:
        found = drafting.generate_batch(TEXTS, **options).answers
    assert [answer.tokens for answer in found] == expected
