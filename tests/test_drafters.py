"""Drafts of the MTP layer and of small models: what they are made of, and whether any is wrong."""

import json

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from gguf_files import write_gguf
from mlx_lm.models import llama
from test_drafts import BITS, CODE, Planted, decode, kept, same
from test_generate import VOCAB, write_tokenizer
from test_mtp_models import move_mtp

from glm_fused import Engine, EngineOptions
from glm_fused.generation.decoding import Drafting
from glm_fused.generation.drafts.depth import Depth, Plan
from glm_fused.generation.drafts.lookup import LookupDrafter
from glm_fused.generation.drafts.mixed import MixedDrafter
from glm_fused.generation.drafts.mtp import MtpDrafter
from glm_fused.generation.drafts.options import DraftOptions
from glm_fused.generation.drafts.small_model import ModelDrafter

PROMPT = list(range(3, 40))


class PlantedMtp(MtpDrafter):
    """Drafts with the layer, but says what was planted, so that some of it stays."""

    def __init__(self, model, text):
        super().__init__(model)
        self._planted = Planted(text)

    def start(self, prompt, cached=0):
        super().start(prompt)
        self._planted.start(prompt)

    def extend(self, tokens, hidden):
        super().extend(tokens, hidden)
        self._planted.extend(tokens, hidden)

    def propose(self, kind, depth, draw):
        own = super().propose(kind, depth, draw)
        planted = self._planted.propose(kind, depth, draw) % VOCAB
        return mx.depends(planted, own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    write_checkpoint(folder, tiny_config(), quantization={"group_size": 32, "bits": 4}, mtp=True)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder, EngineOptions(draft=3)) as engine:
        yield engine


@pytest.fixture(scope="module")
def demo():
    with Engine("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def demo_mtp():
    with Engine("demo", EngineOptions(draft=3)) as engine:
        yield engine


def check_rows(model, depth, drafts=True):
    """Decode with drafts; the MTP cache has to hold what the whole text at once puts into it."""
    plain = decode(model, PROMPT)
    drafter = PlantedMtp(model, PROMPT + plain[0])
    drafted = decode(model, PROMPT, Drafting(drafter, Depth(depth)))
    assert same(drafted, plain)
    assert (kept(drafted[2]) > 0) == drafts
    check_cached(model, drafter, PROMPT + plain[0])


def check_cached(model, drafter, text):
    drafter.propose(drafter.kinds()[0], 1, lambda logits, _: mx.argmax(logits, -1))
    text = mx.array([text])
    _, hidden = model.states(text[:, :-1], model.make_cache())
    cache = model.make_mtp_cache()
    model.draft(text[:, 1:], hidden, cache)
    for found, expected in zip(drafter._cache.caches, cache.caches, strict=True):
        assert found.offset == expected.offset == text.size - 1
        rows = slice(0, expected.offset)
        for a, b in ((found.keys, expected.keys), (found.values, expected.values)):
            bits = BITS[a.dtype.size]
            assert mx.array_equal(a[:, :, rows].view(bits), b[:, :, rows].view(bits))


@pytest.mark.parametrize("depth", [1, 3, 8, "auto"])
def test_its_rows_are_those_of_the_text(engine, depth):
    check_rows(engine.model, depth)


def test_its_rows_where_nothing_is_drafted(engine, monkeypatch):
    """They are appended now and then; few hidden states wait."""
    from glm_fused.generation.drafts import mtp

    model, waiting, extend = engine.model, [], MtpDrafter.extend

    def counted(self, tokens, hidden):
        extend(self, tokens, hidden)
        waiting.append(sum(each.shape[1] for each in self._hidden))

    monkeypatch.setattr(mtp, "MOST_WAITING", 8)
    monkeypatch.setattr(Depth, "next", lambda *args: None)
    monkeypatch.setattr(MtpDrafter, "extend", counted)
    check_rows(model, 3, drafts=False)
    assert max(waiting) == 8


@pytest.mark.parametrize("kv_format", ["fp8", "int8"])
def test_its_rows_in_other_formats(engine, kv_format):
    engine.model.kv_format = kv_format
    try:
        check_rows(engine.model, 4)
    finally:
        engine.model.kv_format = "auto"


def test_its_rows_where_experts_are_streamed(folder):
    with Engine(folder, EngineOptions(draft=3, slots=3)) as engine:
        check_rows(engine.model, 3)


@pytest.mark.parametrize("fault", ["a row stays", "one position late"])
def test_planted_faults_in_its_rows_are_found(engine, monkeypatch, fault):
    if fault == "a row stays":
        from glm_fused.generation.drafts import mtp

        trim = mtp.trim
        monkeypatch.setattr(mtp, "trim", lambda cache, n: trim(cache, max(n - 1, 0)))
    else:
        extend = MtpDrafter.extend
        monkeypatch.setattr(
            MtpDrafter, "extend", lambda self, t, h: extend(self, t, mx.roll(h, 1, axis=1))
        )
    with pytest.raises(AssertionError):
        check_rows(engine.model, 4)


def test_the_checkpoint_says_what_drafts(engine, folder):
    assert engine.drafts == DraftOptions(3, "mtp+lookup")
    drafted = engine.generate(PROMPT, max_tokens=20)
    assert drafted.drafts["source"] == "mtp+lookup"
    with Engine(folder, EngineOptions(draft=3, draft_from="lookup")) as other:
        assert not other.model.args.has_mtp
        assert other.generate(PROMPT, max_tokens=20).tokens == drafted.tokens
    sampled = [engine.generate(PROMPT, max_tokens=20, temp=1.0, seed=4).tokens for _ in range(2)]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("layout", ["oMLX", "GGUF"])
def test_a_layer_under_other_names_drafts(tmp_path, layout):
    """Without being told; the text is that without drafts."""
    if layout == "GGUF":
        path = write_gguf(tmp_path / "model.gguf", mtp=True)
    else:
        path = write_checkpoint(tmp_path, mtp=True, edit=move_mtp)
    with Engine(path, EngineOptions(draft=3), tokenizer=False) as engine:
        assert engine.drafts == DraftOptions(3, "mtp+lookup")
        plain = decode(engine.model, PROMPT)
        drafted = decode(engine.model, PROMPT, Drafting.of(engine.drafts, engine.model))
    assert same(drafted, plain)
    assert drafted[2].statistics.describe(None)["sources"]["mtp"]["proposed"] > 0


class Turns(Depth):
    """Each kind of draft in turn, and plain steps between."""

    def next(self, kinds, most, lacking):
        self.count_of_steps = getattr(self, "count_of_steps", 0) + 1
        at = self.count_of_steps % 4
        return Plan(kinds[at % len(kinds)], min(3, most)) if at and most > 0 else None

    def count(self, plan, kept, seconds):
        pass


def test_the_layer_and_the_text_take_turns(demo_mtp):
    """Rows that the layer lacks after drafts from the text are made before it drafts again."""
    model, prompt = demo_mtp.model, demo_mtp.encode(CODE * 3, raw=True)
    plain = decode(model, prompt)
    layer = MtpDrafter(model)
    drafted = decode(model, prompt, Drafting(MixedDrafter([LookupDrafter(), layer]), Turns(3)))
    assert same(drafted, plain)
    sources = drafted[2].statistics.describe(None)["sources"]
    assert all(sources[name]["rounds"] and sources[name]["accepted"] for name in ("mtp", "lookup"))
    check_cached(model, layer, prompt + plain[0])


def test_a_small_model_of_this_package(demo):
    """The model itself, whose drafts all stay: sampled ones, too, drawn with the same keys."""
    prompt = demo.encode(CODE, raw=True)
    with Engine("demo", EngineOptions(draft=4, draft_from=demo.path)) as engine:
        greedy = engine.generate(prompt, max_tokens=31)
        sampled = engine.generate(prompt, max_tokens=31, temp=0.9, top_p=0.9, seed=3)
    assert greedy.tokens == demo.generate(prompt, max_tokens=31).tokens
    for completion in (greedy, sampled):
        assert completion.drafts["acceptance"] == [1, 1, 1, 1]
    assert greedy.drafts["source"] == str(demo.path)


def test_a_small_model_of_mlx_lm(demo):
    """Another architecture, which guesses badly; its cache has the known tokens all the same."""
    mx.random.seed(0)
    args = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    small = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=demo.model.args.vocab_size + 64,
            **args,
        )
    )
    prompt = demo.encode(CODE * 8, raw=True)
    drafter = ModelDrafter(small, demo.model.args.vocab_size)
    plain = decode(demo.model, prompt)
    assert same(decode(demo.model, prompt, Drafting(drafter, Depth(3))), plain)
    drafter.propose(drafter.kinds()[0], 1, lambda logits, _: mx.argmax(logits, -1))
    assert drafter._cache[0].offset == len(prompt + plain[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 255}, "knows 255 tokens, expected the model's 256"),
        ({}, "has another vocabulary"),
    ],
)
def test_another_vocabulary(folder, tmp_path, change, message):
    write_checkpoint(tmp_path, tiny_config(**change))
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["vocab"]["other"] = document["model"]["vocab"].pop("w249")
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        Engine(folder, EngineOptions(draft=2, draft_from=str(tmp_path)))


@pytest.mark.parametrize(
    ("draft_from", "kind", "message"),
    [
        ("mtp", ValueError, "expected at least 1|expected an MTP layer"),
        ("nowhere", FileNotFoundError, "nowhere does not exist"),
    ],
)
def test_what_is_not_there(draft_from, kind, message, tmp_path):
    write_checkpoint(tmp_path, tiny_config())
    write_tokenizer(tmp_path)
    with pytest.raises(kind, match=message):
        Engine(tmp_path, EngineOptions(draft=2, draft_from=draft_from))
