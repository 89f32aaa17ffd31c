"""The package around the kernels: stub, version check, what is shipped."""

from __future__ import annotations

import ast
import importlib.metadata
import pydoc
import re
import subprocess
import sys
import zlib
from importlib.resources import files
from pathlib import Path

import pytest

import glm_fused
from glm_fused import _abi, _ext
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.layer_contents import mtp_layers
from glm_fused.models.config import args_from_config


def test_the_stub_matches_the_extension(tmp_path):
    generated = tmp_path / "_ext.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "glm_fused._ext", "-o", generated],
        check=True,
    )
    committed = Path(str(files("glm_fused") / "_ext.pyi"))
    # Versions are values of this build, not part of the interface.
    mask = [
        re.sub(r"(built_with_\w+: str).*", r"\1", p.read_text()) for p in (committed, generated)
    ]
    assert ast.dump(ast.parse(mask[0])) == ast.dump(ast.parse(mask[1])), (
        "regenerate: python -m nanobind.stubgen -m glm_fused._ext -o python/glm_fused/_ext.pyi"
        " && ruff format python/glm_fused/_ext.pyi"
    )


def test_an_extension_of_another_mlx_is_refused(monkeypatch):
    monkeypatch.setattr(_ext, "built_with_mlx", "0.0.1")
    installed = importlib.metadata.version("mlx")
    with pytest.raises(ImportError, match=rf"built with mlx 0\.0\.1 .* but mlx {installed}"):
        _abi.check()


def test_an_extension_of_another_nanobind_is_refused(monkeypatch):
    def incompatible(_):
        raise TypeError("probe(): incompatible function arguments")

    monkeypatch.setattr(_ext, "probe", incompatible)
    with pytest.raises(
        ImportError, match=rf"nanobind {_ext.built_with_nanobind}.*another nanobind"
    ):
        _abi.check()


def test_the_version_is_the_one_installed():
    assert glm_fused.__version__ == importlib.metadata.version("glm-fused")


def test_typed_and_with_its_demo_model():
    package = files("glm_fused")
    assert (package / "py.typed").is_file()
    demo = package / "demo_model"
    in_wheel = {f.name: len(zlib.compress(f.read_bytes())) for f in demo.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(in_wheel)
    assert sum(in_wheel.values()) <= 6_000_000
    checkpoint = Checkpoint.open("demo")
    (layer,) = mtp_layers(args_from_config(checkpoint.config), checkpoint.tensors)
    assert not layer.missing


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_counts_are_checked(threads):
    before = glm_fused.num_threads()
    with pytest.raises(ValueError, match="between 1 and 1024"):
        glm_fused.set_num_threads(threads)
    assert glm_fused.num_threads() == before


def test_thread_count_is_settable():
    before = glm_fused.num_threads()
    glm_fused.set_num_threads(3)
    assert glm_fused.num_threads() == 3
    glm_fused.set_num_threads(before)


def test_the_public_names_are_all_that_is_listed():
    expected = {
        "Engine", "EngineOptions", "StreamOptions", "__version__", "generate", "load", "load_model",
        "num_threads", "ops", "reference_path", "set_num_threads", "stream_generate",
    }  # fmt: skip
    assert set(dir(glm_fused)) == set(glm_fused.__all__) == expected
    for name in expected:
        assert getattr(glm_fused, name) is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("load", ("Raises", "Returns", "tokenizer")),
        ("load_model", ("Raises", "[batch, length]", "vocabulary]")),
        ("generate", ("Raises", "[n]")),
        ("stream_generate", ("Raises", "Returns")),
        ("Engine", ("Raises", "logits", "[batch, length, vocabulary]", "closed")),
        ("EngineOptions", ("Raises", "bytes", "tokens")),
        ("StreamOptions", ("bytes", "tokens", "seconds")),
        ("num_threads", ("ValueError",)),
        ("set_num_threads", ("ValueError", "1 to 1024")),
        ("reference_path", ("raises nothing", "thread")),
    ],
)
def test_help_tells_shapes_units_and_errors(name, words):
    text = " ".join(pydoc.plain(pydoc.render_doc(getattr(glm_fused, name))).split())
    for word in words:
        assert word.lower() in text.lower(), word


@pytest.mark.parametrize(
    "name",
    ["quantized_matvec", "moe_decode", "router_topk", "indexer_topk", "sparse_mla_decode",
     "swiglu", "expert_sum", "rms_norm", "layer_norm", "rotate"],
)  # fmt: skip
def test_help_of_an_op_tells_shapes_dtypes_and_errors(name):
    text = getattr(glm_fused.ops, name).__doc__
    assert all(word in text for word in ("Args:", "Raises:", "ValueError", "float"))
    assert name == "swiglu" or "[" in text
