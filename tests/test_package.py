"""The package around the kernels: stub, version check, what is shipped."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import glm_fused
from glm_fused import _abi, _ext


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
    sizes = {f.name: len(f.read_bytes()) for f in demo.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) <= 6_000_000


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
