"""When kernels are looked up and compiled: once, and before the first token."""

import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from formats_under_test import assert_same_bits
from metal_backend import cpu, metal, simulated_only
from sim.host import compiled
from test_metal_launches import CACHED, model

import glm_fused
from glm_fused import Engine, StreamOptions, reference_path
from glm_fused.cli.loading import open_engine
from glm_fused.models import kernels
from glm_fused.ops import metal_sim

pytestmark = simulated_only


def prompted(net):
    """A cache with more tokens than an indexer keeps."""
    cache = net.make_cache()
    mx.eval(net(mx.zeros((1, CACHED), mx.int32), cache))
    return cache


class Asked:
    """A compiler that runs nothing, and knows the libraries and kernels that it was asked for."""

    def __init__(self):
        self.libraries, self.kernels = [], []

    def __call__(self, name, text):
        self.libraries.append(name)
        self.kernels += re.findall(r'host_name\("(\w+)"\)', text)

    def by(self, net, cache, *shape):
        """The libraries that a step of tokens [b, l] asks for."""
        self.libraries.clear()
        mx.eval(net(mx.ones(shape, mx.int32), cache))
        return list(self.libraries)


def test_a_kernel_is_asked_for_once():
    net, asked = model(), Asked()
    cache = prompted(net)
    with metal(compiler=asked):
        first = asked.by(net, cache, 1, 1)
        metal_sim.take_launches()
        assert len(first) == len(set(first)) > 8
        assert asked.by(net, cache, 1, 1) == []
        assert len(metal_sim.take_launches()) > 2 * len(first)
    with metal(compiler=asked):  # other settings are another device
        assert asked.by(net, cache, 1, 1) == first


def steps_after_loading(net, asked):
    """The libraries that prompts and steps of every size ask for."""
    found = []
    for batch, sizes in ((1, (40, 1, 2, 5, 16, 3, 17, 200)), (2, (3, 1, 8, 30, 1, 7))):
        cache = net.make_cache()
        for tokens in sizes:
            found += asked.by(net, cache, batch, tokens)
    return found


FORMATS = {
    "affine4": (None, "mlx", {"group_size": 32, "bits": 4}),
    "mixed": ("fp8", "mlx", {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    "dense": ("int8", "hf", None),
}


def folder(path, name):
    kv_format, layout, quantization = FORMATS[name]
    config = tiny_config()
    return write_checkpoint(path, config, layout=layout, quantization=quantization), kv_format


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_compiled_after_loading(tmp_path, name):
    path, kv_format = folder(tmp_path, name)
    asked = Asked()
    with metal(compiler=asked):
        net, _ = glm_fused.load_model(path, kv_format=kv_format or "auto")
        assert len(asked.libraries) == len(set(asked.libraries)) <= 14  # one a shader
        assert len(asked.kernels) == len(set(asked.kernels)) > 30
        assert metal_sim.take_launches() == []
        assert steps_after_loading(net, asked) == []


def test_what_is_left_out_is_compiled_later(tmp_path, monkeypatch):
    """The test above would notice."""
    monkeypatch.setattr(kernels, "_TOKENS", (1, 4, 8, 16, 17))
    path, _ = folder(tmp_path, "affine4")
    asked = Asked()
    with metal(compiler=asked):
        net, _ = glm_fused.load_model(path)
        assert any("project" in name for name in steps_after_loading(net, asked))


def test_long_contexts_are_compiled_for(tmp_path):
    """Without memory for their caches: nothing is evaluated."""
    config = tiny_config(max_position_embeddings=1 << 20, index_topk=2048)
    net, _ = glm_fused.load_model(write_checkpoint(tmp_path, config))
    asked = Asked()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with metal(compiler=asked):
        kernels.compile_kernels(net)
    assert mx.get_peak_memory() - before < 1 << 20
    found = {name for name in asked.kernels if "index_select" in name}
    assert found == {
        f"glm_fused_index_select_{first}__{last}_"
        for first, last in (("true", "true"), ("true", "false"), ("false", "false"),
                            ("false", "true"))
    }  # fmt: skip


@pytest.mark.parametrize("slots", [None, 3])
def test_a_model_loaded_on_metal_gives_the_cpus_bits(tmp_path, slots):
    """In memory or streamed, with kernels that were compiled together."""
    path, _ = folder(tmp_path, "affine4")
    stream = None if slots is None else StreamOptions(slots=slots)
    asked = []

    def compiler(name, text):
        asked.append(name)
        return compiled(name, text, contract=True, trace=False)

    with metal(compiler=compiler):
        net, _ = glm_fused.load_model(path, stream=stream)
        before = len(asked)
        found = logits_of(net)
        assert len(asked) == before <= 14
    with cpu(), reference_path():
        expected = logits_of(glm_fused.load_model(path)[0])
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def logits_of(net):
    """The logits of a prompt and of steps of some sizes."""
    rng, cache, found = np.random.default_rng(5), net.make_cache(), []
    for tokens in (20, 1, 2, 5, 16, 1):
        found.append(net(mx.array(rng.integers(0, 256, (1, tokens))), cache))
        mx.eval(found[-1])
    return found


def test_it_can_be_switched_off(tmp_path):
    path, _ = folder(tmp_path, "affine4")
    asked = Asked()
    with metal(compiler=asked):
        net, _ = glm_fused.load_model(path, compile_kernels=False)
        assert Engine(path, tokenizer=False, compile_kernels=False).model is not None
        assert asked.libraries == []
        assert len(steps_after_loading(net, asked)) > 30


def test_other_devices_and_paths_compile_nothing(tmp_path):
    path, _ = folder(tmp_path, "affine4")
    asked = Asked()
    net, _ = glm_fused.load_model(path)
    assert kernels.compile_kernels(net) == 0
    with metal(compiler=asked), reference_path():
        assert kernels.compile_kernels(net) == 0
    assert asked.libraries == []


def test_progress_counts_kernels(tmp_path):
    path, _ = folder(tmp_path, "affine4")
    seen, asked = [], Asked()
    with metal(compiler=asked):
        Engine(path, tokenizer=False, on_compile=lambda *counts: seen.append(counts))
    total = len(asked.kernels) + 1  # group_pairs is no template
    assert seen == [(i, total) for i in range(total + 1)]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_shows_progress(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with metal(compiler=Asked()):
        open_engine("demo", None).close()
    shown = capsys.readouterr().err
    assert ("compiling kernels: 0 of " in shown) == terminal
    assert terminal or shown == ""


def test_a_shader_that_does_not_compile_ends_loading(tmp_path):
    def refuse(*_):
        raise RuntimeError("error: no such type")

    path, _ = folder(tmp_path, "affine4")
    with metal(compiler=refuse), pytest.raises(RuntimeError, match="no such type"):
        glm_fused.load_model(path)
