"""Drafts on Metal: the text and logits of the CPU without any, past where the indexer selects."""

import pytest
from conftest import tiny_config, write_checkpoint
from metal_backend import GPU, cpu, metal
from test_drafters import PlantedMtp
from test_drafts import decode, kept, same
from test_whole_tokens import AFFINE, PROMPT, TOPK

from glm_fused.generation.decoding import Decoding, Drafting
from glm_fused.generation.drafts.depth import Depth
from glm_fused.loader import load_model
from glm_fused.ops import metal_sim
from glm_fused.streaming.options import StreamOptions

TOKENS, FEW = 64, 16
STREAM = StreamOptions(budget=8 << 30, slots=6, patience=30.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("drafts")
    write_checkpoint(path, tiny_config(index_topk=TOPK), quantization=AFFINE, shards=2, mtp=True)
    return path


def on_metal(folder, tokens, depth=3, **options):
    """What the CPU gives without drafts, and Metal with them, some of which are wrong."""
    prompt = PROMPT[0].tolist()
    with cpu():
        plain = decode(load_model(folder, mtp=True, **options)[0], prompt, tokens=tokens)
    model, _ = load_model(folder, mtp=True, **options)
    with metal():
        drafting = Drafting(PlantedMtp(model, prompt + plain[0]), Depth(depth))
        drafted = decode(model, prompt, drafting, tokens=tokens)
    assert GPU or len(metal_sim.take_launches()) > 40 * len(drafted[0]) // (1 + depth)
    return plain, drafted


def is_the_cpus(*given, **options):
    plain, drafted = on_metal(*given, **options)
    assert kept(drafted[2]) > 0
    return same(drafted, plain)


def test_some_tokens_are_the_cpus_without_drafts(folder):
    assert is_the_cpus(folder, FEW)


def test_a_row_that_is_not_rolled_back_is_found(folder, monkeypatch):
    trim = Decoding._trim
    monkeypatch.setattr(Decoding, "_trim", lambda self, n: trim(self, n - 1))
    assert not same(*on_metal(folder, FEW))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_format", "stream", "depth"),
    [("auto", None, 3), ("int8", STREAM, 2), ("fp8", None, 8)],
    ids=["auto-resident-3", "int8-streamed-2", "fp8-resident-8"],
)
def test_many_are(folder, kv_format, stream, depth):
    assert is_the_cpus(folder, TOKENS, depth, kv_format=kv_format, stream=stream)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 8])
def test_those_of_the_bundled_model_are(depth):
    assert is_the_cpus("demo", TOKENS, depth)
