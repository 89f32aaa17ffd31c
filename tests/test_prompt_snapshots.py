"""Prompts in files: whole or gone, whatever happens, and never those of anything else."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest
from kept_prompts import (
    SIZE,
    feed,
    goes_on,
    made_up,
    put,
    same_rows,
    some_tokens,
    store_of,
    token_bytes,
    unlike_texts,
)

import glm_fused
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.identity import checkpoint_id
from glm_fused.checkpoint.safetensors_header import read_header
from glm_fused.formats.kv_rows import KV_FORMATS
from glm_fused.generation.prompt_cache import snapshots as snapshots_module
from glm_fused.generation.prompt_cache.blocks import add_child, as_tokens
from glm_fused.generation.prompt_cache.rows import cut
from glm_fused.generation.prompt_cache.saving import Saver
from glm_fused.generation.prompt_cache.snapshots import LOCK, Identity, Snapshots

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["glm_fused.generation.prompt_cache.saving", "test_prompt_snapshots"])
IDENTITY = Identity("demo", "auto", SIZE)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prompts"


def opened(model, folder, limit=1 << 30, **options):
    return store_of(model, limit, folder=folder, **{"model_id": "demo"} | options)


def files(folder):
    return sorted(path for path in folder.iterdir() if path.name != LOCK)


def fill(model, folder, *texts):
    """A folder with the texts, by a store that is closed again; returns its files."""
    with opened(model, folder) as store:
        for text in texts:
            put(store, model, text)
    return files(folder)


@contextmanager
def warnings(caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="glm_fused"):
        yield lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_text_goes_on_after_a_restart(model, rng, folder, kv_format):
    model.kv_format = kv_format
    text = some_tokens(model, rng, rng.choice([65, 79, 80]))
    with opened(model, folder) as store:
        store.put(text, feed(model, text, steps=(40, 1))[0])
    with opened(model, folder) as store:
        assert (store.nbytes, store.describe()["tokens"]) == (0, len(text))
        n = rng.randrange(1, 79)
        other = [*text[:n], (text[n] + 1) % 2048, 5] if n < len(text) else [*text, 1, 2]
        assert goes_on(model, store, other) == (min(n, len(text)), True)
        read = store.describe()["disk"]["loaded_blocks"]
        assert read == -(-min(n, len(text)) // SIZE)
        assert goes_on(model, store, [*text, 3]) == (len(text), True)


def test_a_turn_writes_its_own_tokens_alone(model, rng, folder):
    text = some_tokens(model, rng, 4 * SIZE + 3)
    first = set(fill(model, folder, text))
    longer = [*text, *some_tokens(model, rng, 3 * SIZE)]
    second = set(fill(model, folder, longer))
    assert len(first) == 5 and len(second) == 8
    assert len(first & second) == 4  # the last block of the first text is a longer one now


def test_a_file_is_a_safetensors_file(model, rng, folder):
    (file,) = fill(model, folder, some_tokens(model, rng, 5))
    header = read_header(file)
    layers, args = len(model.args.layers), model.args
    assert header["latents"].shape == (layers, 5, args.kv_lora_rank)
    assert {"latents", "rope", "index_keys"} == set(header)


IDENTITIES = {
    "model": {"model_id": "another"},
    "kv_format": {},
    "block_tokens": {"block_tokens": 2 * SIZE},
    "version": {},
    "program": {},
}


@pytest.mark.parametrize("what", IDENTITIES)
def test_a_folder_of_something_else_is_refused(model, rng, folder, monkeypatch, what):
    """With one message that says what differs, and nothing is changed."""
    text = some_tokens(model, rng, 40)
    before = {path: path.read_bytes() for path in fill(model, folder, text)}
    with monkeypatch.context() as patch:
        if what == "kv_format":
            model.kv_format = "fp8"
        if what == "version":
            patch.setattr(snapshots_module, "VERSION", 2)
        if what == "program":
            patch.setattr(snapshots_module.packages, "version", lambda name: "9.9")
        for _ in range(2):  # the refusal leaves the folder to others
            with pytest.raises(ValueError, match=f"is of {what} '.*', expected '.*'; choose anoth"):
                opened(model, folder, **IDENTITIES[what])
    model.kv_format = "auto"
    assert {path: path.read_bytes() for path in files(folder)} == before
    with opened(model, folder) as store:
        assert store.take(text)[1] == 40


def damaged(rng, data, kind):
    at = rng.randrange(len(data))
    if kind == "header":
        at = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    if kind == "cut":
        return data[:at]
    if kind == "longer":
        return data + bytes([rng.randrange(256)])
    return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


@pytest.mark.parametrize("kind", ["byte", "header", "cut", "longer", "another"])
def test_a_damaged_file_is_refused(model, rng, tmp_path, caplog, kind):
    """At random places: it is warned of and deleted, and what was before it is there still."""
    text = some_tokens(model, rng, 3 * SIZE)
    fill(model, tmp_path / "whole", text)
    for i in range(5 if kind in ("another", "longer") else 30):
        shutil.copytree(tmp_path / "whole", folder := tmp_path / f"{kind}{i}")
        with opened(model, folder) as store:
            chain = [block.id for block in store._blocks()]
        victim = rng.randrange(3)
        path = folder / f"{chain[victim]}.safetensors"
        other = folder / f"{chain[victim - 1]}.safetensors"
        data = path.read_bytes()
        path.write_bytes(other.read_bytes() if kind == "another" else damaged(rng, data, kind))
        with warnings(caplog) as said, opened(model, folder) as store:
            cache, n = store.take(text)
            assert n == victim * SIZE
            assert same_rows(cache, made_up(model, text[:n])) if n else cache[0].empty()
            assert not path.exists()
            assert len(said()) == 1 and str(path) in said()[0] and "not used" in said()[0]
            put(store, model, text)
            assert store.take(text)[1] == 3 * SIZE
        shutil.rmtree(folder)
    with warnings(caplog) as said, opened(model, tmp_path / "whole") as store:  # the control
        assert store.take(text)[1] == 3 * SIZE and not said()


def test_what_is_not_used_gives_way_on_disk(model, rng, folder):
    texts = unlike_texts(model, rng, 4, 2 * SIZE)
    nbytes = sum(path.stat().st_size for path in fill(model, folder, *texts[:3]))
    with opened(model, folder) as store:
        assert store.take(texts[0])[1] == 2 * SIZE
    limit = nbytes + 100  # of three texts
    with opened(model, folder, disk_bytes=limit) as store:  # which knows what was used last
        put(store, model, texts[3])
        store.flush()
        found = store.describe()["disk"]
        assert found["bytes"] == sum(path.stat().st_size for path in files(folder)) <= limit
    with opened(model, folder, disk_bytes=limit) as store:
        assert [store.take(text)[1] for text in texts] == [32, 0, 32, 32]
    with opened(model, folder, disk_bytes=limit // 3) as store:
        assert len(files(folder)) == 2
        assert [store.take(text)[1] for text in texts] == [0, 0, 0, 32]
    with opened(model, folder, disk_bytes=0) as store:
        assert not files(folder)


@pytest.mark.parametrize("clock", ["quick", "stands still", "goes back"])
def test_files_tell_in_which_order_they_were_used(model, rng, folder, monkeypatch, clock):
    """However short after one another, and over restarts."""
    now, step = time.time_ns(), {"stands still": 0, "goes back": -(10**9)}
    if clock in step:
        times = itertools.count(now, step[clock])
        monkeypatch.setattr("time.time_ns", lambda: next(times))
    monkeypatch.setattr("os.fsync", lambda file: None)  # which takes longer than a clock's tick
    texts = unlike_texts(model, rng, 12, SIZE)
    fill(model, folder, *texts)
    used = rng.sample(range(12), 8)
    for some in (used[:4], used[4:]):
        with opened(model, folder) as store:
            for i in some:
                assert store.take(texts[i])[1] == SIZE
    with opened(model, folder) as store:
        blocks = {tuple(block.tokens.tolist()): block.id for block in store._blocks()}
    paths = [folder / f"{blocks[tuple(text)]}.safetensors" for text in texts]
    order = sorted(range(12), key=lambda i: paths[i].stat().st_mtime_ns)
    assert order == [i for i in range(12) if i not in used] + used


def test_what_leaves_memory_is_read_again(model, rng, folder):
    texts = [some_tokens(model, rng, 3 * SIZE) for _ in range(4)]
    limit = 4 * SIZE * token_bytes(model)
    with opened(model, folder, limit) as store:
        for text in texts:
            put(store, model, text)
            store.flush()
            assert store.nbytes <= limit
        for text in texts:
            cache, n = store.take(text)
            assert n == 3 * SIZE and same_rows(cache, made_up(model, text))
            assert store.nbytes <= limit
        assert store.describe()["disk"]["loaded_blocks"] > 0


def test_leftovers_go_and_other_files_stay(model, rng, folder):
    text = some_tokens(model, rng, 3 * SIZE)
    names = fill(model, folder, text)
    left = folder / f"{names[0].name}.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    mine = [folder / "model.safetensors", folder / "notes.tmp", folder / ("a" * 64)]
    for path in mine:
        path.write_text("mine")
    (folder / f"{'b' * 64}.safetensors").mkdir()
    with opened(model, folder) as store:
        first = store._blocks()[0].id
        assert store.take(text)[1] == 3 * SIZE
    (folder / f"{first}.safetensors").unlink()
    with opened(model, folder) as store:  # blocks without the one before them are of no use
        assert store.take(text)[1] == 0
    assert files(folder) == sorted([*mine, folder / f"{'b' * 64}.safetensors"])


def _hold(folder, ready):
    Snapshots(folder, IDENTITY)
    ready.send(None)
    time.sleep(600)


def test_a_folder_is_one_process_s(model, rng, folder):
    text = some_tokens(model, rng, 20)
    fill(model, folder, text)
    here, there = FORKS.Pipe()
    holder = FORKS.Process(target=_hold, args=(folder, there), daemon=True)
    holder.start()
    here.recv()
    with pytest.raises(ValueError, match=r"another process keeps its prompts in .*prompts; choose"):
        opened(model, folder)
    holder.kill()
    holder.join()
    with opened(model, folder) as store:
        assert store.take(text)[1] == 20
        with pytest.raises(ValueError, match="another process"):
            opened(model, folder)


def test_a_disk_that_fails_is_warned_of_and_tried_again(model, rng, folder, monkeypatch, caplog):
    text = some_tokens(model, rng, 3 * SIZE)

    @contextmanager
    def full(path):
        raise OSError(28, "No space left on device", str(path))
        yield

    with opened(model, folder) as store:
        with monkeypatch.context() as patch, warnings(caplog) as said:
            patch.setattr(snapshots_module, "new_file", full)
            put(store, model, text)
            store.flush()
            assert said() and "No space left on device" in said()[0]
            assert len(said()) <= 2  # blocks after it are not tried
            assert store.take(text)[1] == 3 * SIZE
            assert store.describe()["disk"]["bytes"] == 0
        put(store, model, text)
        store.flush()
        assert len(files(folder)) == 3


def test_memory_alone_needs_no_id_and_a_folder_does(model, folder):
    assert store_of(model).describe()["disk"] is None
    with pytest.raises(ValueError, match="a folder needs a model_id"):
        store_of(model, folder=folder)


def test_ids_tell_checkpoints_apart(tmp_path):
    source = Checkpoint.open("demo")
    shutil.copytree(source.path, copy := tmp_path / "copy")
    assert checkpoint_id(Checkpoint.open(copy)) == checkpoint_id(source)
    config = copy / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"index_topk": 64', '"index_topk": 32'))
    assert checkpoint_id(Checkpoint.open(copy)) != checkpoint_id(source)
    config.write_text(text)
    info = source.tensors["model.layers.3.self_attn.o_proj.weight"]
    file = bytearray((copy / info.file).read_bytes())
    file[(info.start + info.end) // 2] ^= 1
    (copy / info.file).write_bytes(file)
    assert checkpoint_id(Checkpoint.open(copy)) != checkpoint_id(source)


def test_an_engine_makes_a_store_that_outlives_it(rng, folder):
    for expected in (0, 30):
        with glm_fused.Engine("demo") as engine, engine.prompt_store(1 << 28, folder) as store:
            text = [*range(30), 5]
            assert store.take(text[:30])[1] == expected
            store.put(text[:30], feed(engine.model, text[:30])[0])
    options = glm_fused.EngineOptions(kv_format="int8")
    with (
        glm_fused.Engine("demo", options) as engine,
        pytest.raises(ValueError, match="is of kv_format 'auto', expected 'int8'"),
    ):
        engine.prompt_store(1 << 28, folder)


# Saving in a process that is killed. It gets blocks, and does nothing else with them.


@contextmanager
def _in_place(path):
    """The planted fault: files have their names before they are whole."""
    with path.open("wb") as file:
        writes = []

        class Slow:
            write = staticmethod(writes.append)

        yield Slow
        for data in writes:
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(0.002)


def _save(folder, blocks, planted, ready):
    if planted:
        snapshots_module.new_file = _in_place
    snapshots = Snapshots(folder, IDENTITY)

    def saved(block, nbytes):
        block.file_bytes = nbytes

    saver = Saver(snapshots, 1 << 40, saved)
    ready.send(None)
    for block in blocks:
        saver.add(block)
    saver.close()
    ready.send(None)


class Saved:
    """Texts with their logits, and a process that saves them and may be killed meanwhile."""

    def __init__(self, model, rng):
        self._model = model
        texts = [some_tokens(model, rng, 75) for _ in range(2)]
        self._logits, self._blocks = [], []
        for text in texts:
            cache, logits = feed(model, text)
            self._logits.append((text, logits))
            parent = IDENTITY.root()
            for first in range(0, len(text), SIZE):
                tokens = as_tokens(text[first : first + SIZE])
                parent = add_child(parent, tokens)
                parent.rows = cut(cache, first, first + len(tokens))
                self._blocks.append(parent)

    def run(self, folder, planted=False, delay=None):
        """Save, and kill the process so many seconds after it began.

        Returns how long saving took; None where it was killed before its end.
        """
        here, there = FORKS.Pipe()
        process = FORKS.Process(target=_save, args=(folder, self._blocks, planted, there))
        process.start()
        there.close()  # so that one that fails is no longer waited for
        here.recv()
        began = time.perf_counter()
        if delay is not None:
            time.sleep(delay)
            process.kill()
        try:
            here.recv()
            return time.perf_counter() - began
        except (EOFError, ConnectionResetError):
            return None
        finally:
            process.join()

    def problems(self, folder, caplog):
        """What is wrong after a restart: files that are not whole, and wrong answers."""
        with warnings(caplog) as said, opened(self._model, folder) as store:
            found = [name for name in files(folder) if name.suffix != ".safetensors"]
            for text, expected in self._logits:
                cache, n = store.take(text[:-1])
                if not np.array_equal(feed(self._model, text[n:], cache)[1], expected[n:]):
                    found.append(f"other logits after {n} tokens")
            return found + said()


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_leaves_whole_files_or_none(model, rng, tmp_path, caplog, kills):
    """At random points of saving; and after a restart answers are right."""
    saved = Saved(model, rng)
    seconds = saved.run(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 10 and not saved.problems(tmp_path / "whole", caplog)
    partial = False
    for i in range(20 * kills):
        folder = tmp_path / str(i // 2)  # another process goes on in half of them
        kills -= saved.run(folder, delay=rng.uniform(0, seconds)) is None
        partial |= 0 < len(list(folder.glob("*.safetensors"))) < 10
        assert not saved.problems(folder, caplog)
        if kills <= 0 and partial:
            return
    pytest.fail(f"{kills} more kills were to come before saving was done, some in its midst")


def test_files_that_are_not_whole_would_be_seen(model, rng, tmp_path, caplog):
    """The control of the test above, which a process that writes in place does not pass."""
    saved = Saved(model, rng)
    seconds = saved.run(tmp_path / "whole", planted=True)
    assert not saved.problems(tmp_path / "whole", caplog)
    for i in range(50):
        saved.run(tmp_path / str(i), planted=True, delay=rng.uniform(0, seconds))
        if saved.problems(tmp_path / str(i), caplog):
            return
    pytest.fail("50 kills while files were written in place left nothing that was noticed")
