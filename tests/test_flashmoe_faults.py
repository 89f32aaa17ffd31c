"""Files of GGUF models that shrink or are replaced in use, and exports that end early."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import tiny_config
from gguf_files import write_gguf
from test_streaming import run, same, stream

from glm_fused.loader import load_model
from glm_fused.streaming.flashmoe_export import export

EXPORT = """
import resource, signal, sys
from pathlib import Path
from glm_fused.streaming import flashmoe_export as export
model, folder, fault = sys.argv[1:]
written = export._write

def write(*arguments):
    yield from written(*arguments)
    if fault == "kill":
        print("written", flush=True)
        signal.pause()

export._write = write
if fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
export.export(model, Path(folder))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("whole") / "whole.gguf", tiny_config())


def test_a_file_that_shrinks_before_it_is_read(model, tmp_path):
    path = shutil.copy(model, tmp_path / "m.gguf")
    lazy, _ = load_model(path, lazy=True)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(RuntimeError, match=r"\[load\] .*/m.gguf ends before byte \d+"):
        run(lazy)


def test_a_file_that_shrinks_while_it_is_streamed(model, tmp_path):
    path = shutil.copy(model, tmp_path / "m.gguf")
    streamed, _ = load_model(path, stream=stream(2))
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(RuntimeError, match=r"layer \d, expert \d: .*/m.gguf: (ends|was written)"):
        run(streamed)


@pytest.mark.parametrize("of_sidecar", [False, True])
def test_a_file_that_is_replaced_is_read_as_it_was(model, tmp_path, of_sidecar):
    path, expected = shutil.copy(model, tmp_path / "m.gguf"), run(load_model(model)[0])
    export(path, tmp_path / "sidecar")
    options = stream(2, sidecar=tmp_path / "sidecar") if of_sidecar else stream(2)
    streamed, _ = load_model(path, stream=options)
    for file in [path, *(tmp_path / "sidecar").glob("*.bin")]:
        other = tmp_path / "other"
        other.write_bytes(bytes(os.path.getsize(file)))
        other.replace(file)
    assert same(run(streamed), expected)


def start(model, folder, fault):
    command = [sys.executable, "-c", EXPORT, str(model), str(folder), fault]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ)


def is_whole(model, folder):
    both, _ = load_model(folder / "dense" / "model-dense.gguf", stream=stream(4, sidecar=folder))
    return same(run(both), run(load_model(model)[0]))


def test_a_full_disk(model, tmp_path):
    process = start(model, tmp_path / "sidecar", "full")
    assert "File too large" in process.communicate()[1] and process.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export(model, tmp_path):
    process = start(model, tmp_path / "sidecar", "kill")
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "sidecar").exists()
    process = start(model, tmp_path / "sidecar", "")
    assert process.communicate()[1].count("Traceback") == process.returncode == 0
    assert is_whole(model, tmp_path / "sidecar")
