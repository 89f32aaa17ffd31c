"""The slot bank: what is resident where, under concurrency, policies and failing reads."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from policy_model import Table

from glm_fused import _ext

EXPERTS, BYTES = 16, (4096, 100)
CORE = ("learned_policy", "policy", "table", "files", "reader", "bank")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path):
    """A file of experts, in which every byte of an expert is its number."""
    path = tmp_path / "experts.bin"
    path.write_bytes(b"".join(bytes([e]) * sum(BYTES) for e in range(EXPERTS)))
    return path


def make_bank(file, slots, *, policy="lru", spares=0, pins=(), direct=False, checksums=(), **kw):
    files = _ext.SlotFiles([str(file)], [file.stat().st_size], direct)
    locations = kw.get("locations") or [
        (0, e * sum(BYTES) + offset) for e in range(EXPERTS) for offset in (0, BYTES[0])
    ]
    return _ext.slot_bank(
        _ext.SlotReader(3, 4096),
        files,
        7,
        [([BYTES[0]], mx.uint8), ([BYTES[1]], mx.uint8)],
        locations,
        list(checksums),
        slots,
        spares,
        policy,
        list(pins),
        kw.get("patience", 0.3),
    )


def request(bank, experts):
    """The slots of a request, once they are read."""
    slots = resolve(bank, experts)[1]
    mx.eval(slots)
    return slots


def resolve(bank, experts, reads=None):
    """A use of the bank, and its slots, which are there once they are read."""
    use = _ext.SlotUse(bank, reads or _ext.SlotReads())
    pending, _ = use.resolve(mx.array([experts], mx.int32))
    return use, use.wait(pending)


def holds(bank, slots, experts):
    contents = [np.array(a)[slots.tolist()[0]] for a in bank.arrays]
    return all((part == np.array(experts)[:, None]).all() for part in contents)


@pytest.mark.parametrize("policy", ["learned", "lru", "s3fifo", "pinned"])
@pytest.mark.parametrize("direct", [False, True])
def test_slots_hold_what_was_asked_for(file, policy, direct):
    bank = make_bank(file, 5, policy=policy, direct=direct, pins=[3])
    for array in bank.arrays:
        assert array.shape[0] == 5
    rng = np.random.default_rng(0)
    for _ in range(200):
        experts = rng.choice(EXPERTS, 4, replace=False).tolist()
        assert holds(bank, request(bank, experts), experts)
    stats = bank.stats()
    assert stats["hits"] + stats["misses"] == 800
    assert stats["bytes"] == stats["misses"] * sum(BYTES)
    assert stats["hits"] > 0


def test_hits_are_kept_before_victims_are_chosen(file):
    """Evicting the oldest first would take expert 0, which the same request uses."""
    bank = make_bank(file, 3)
    request(bank, [0, 1, 2])
    slots = request(bank, [3, 4, 0])
    assert len(set(slots.tolist()[0])) == 3
    assert holds(bank, slots, [3, 4, 0])
    assert bank.stats()["hits"] == 1


def test_lru_and_pins_choose_their_victims(file):
    lru, pinned = make_bank(file, 3), make_bank(file, 3, policy="pinned", pins=[0])
    for bank in (lru, pinned):
        for expert in (0, 1, 2, 3):
            request(bank, [expert])
    assert lru.resident() == [1, 2, 3]
    assert pinned.resident() == [0, 2, 3]
    assert (lru.capacity, pinned.capacity) == (3, 2)


@pytest.mark.parametrize("policy", ["learned", "lru", "pinned"])
@pytest.mark.parametrize("slots", [7, 11])
def test_policies_evict_what_their_models_do(file, policy, slots):
    """Requests that follow each other with some chance; some keep their slots for a while."""
    rng = np.random.default_rng(slots)
    bank = make_bank(file, slots, policy=policy, pins=[3])
    table = Table(policy, EXPERTS, slots, [3])
    held, at = {}, 0
    for step in range(400):
        at = (3 * at + int(rng.integers(0, 3))) % EXPERTS
        experts = [(at + int(i)) % EXPERTS for i in rng.permutation(5)[: rng.integers(1, 4)]]
        table.reserve(experts, {e for of, _ in held.values() for e in of})
        slots_of = request(bank, experts)
        assert holds(bank, slots_of, experts)
        assert bank.resident() == sorted(table.resident), step
        held.pop(step - 2, None)
        if step % 5 == 0:
            held[step] = experts, slots_of
        del slots_of
    assert bank.stats()["hits"] > 300


def test_the_learned_policy_learns_who_follows_whom(file):
    """Experts come with others of their own in turn, so LRU evicts just those that come next."""
    requests = [[a, b] for i in range(100) for a, b in ((0, 4 + i % 2), (1, 6 + i % 2), (2, 8))]
    learned, _ = _ext.slots_simulate("learned", EXPERTS, 4, [], requests)
    lru, _ = _ext.slots_simulate("lru", EXPERTS, 4, [], requests)
    optimum, _ = _ext.slots_simulate_optimum(EXPERTS, 4, requests)
    assert lru == 0
    assert 0.8 * optimum < learned <= optimum


def test_s3fifo_survives_a_scan(file):
    bank = make_bank(file, 6, policy="s3fifo")
    for expert in (0, 1, 0, 1, 0, 1, *range(2, EXPERTS)):
        request(bank, [expert])
    assert {0, 1} <= set(bank.resident())


def test_a_repeated_expert_takes_one_slot(file):
    bank = make_bank(file, 1)
    assert request(bank, [4, 4, 4]).tolist() == [[0, 0, 0]]
    assert bank.stats()["misses"] == 1


def test_slots_in_use_are_not_overwritten(file):
    bank = make_bank(file, 3)
    held = request(bank, [0, 1])
    with pytest.raises(RuntimeError, match="layer 7: too many slots are held"):
        request(bank, [2, 3])
    assert holds(bank, held, [0, 1])
    assert holds(bank, request(bank, [1, 2]), [1, 2])
    del held
    assert holds(bank, request(bank, [2, 3]), [2, 3])


def test_requests_of_one_graph_take_turns(file):
    """Both need the whole bank, so the second has to come after the first one's use."""
    bank = make_bank(file, 2)
    results = []
    for experts in ([0, 1], [2, 3], [0, 4]):
        use, slots = resolve(bank, experts)
        read = bank.arrays[0][slots[0]].astype(mx.int32).sum(axis=-1)
        results.append((experts, use.release(read, slots)))
        del use, slots, read
    mx.eval([read for _, read in results])
    for experts, read in results:
        assert read.tolist() == [BYTES[0] * e for e in experts]


def test_a_graph_that_is_dropped_is_neither_kept_nor_evaluated(file):
    bank = make_bank(file, 2)
    use, slots = resolve(bank, [0, 1])
    y = use.release(mx.zeros((1, 4)) + 1, slots)
    del use, slots, y
    assert holds(bank, request(bank, [2, 3]), [2, 3])
    assert bank.stats()["misses"] == 2


def test_a_lease_that_no_kernel_uses_yet_is_taken_back(file):
    """Its thread may be waiting for the one that needs the slots; its own turn is served too."""
    bank = make_bank(file, 2, patience=20)
    held = []
    for experts in ([0, 1], [2, 3], [0, 4]):  # only the first gets slots to read into at once
        use = _ext.SlotUse(bank, _ext.SlotReads())
        pending, started = use.resolve(mx.array([experts], mx.int32))
        mx.eval(started)
        held.append((use, pending, experts))
    assert bank.resident() == [0, 1]
    for use, pending, experts in reversed(held):
        slots = use.wait(pending)
        mx.eval(slots)
        assert holds(bank, slots, experts)
        del slots, pending
        held.pop()
        del use
    stats = bank.stats()
    assert stats["hits"] + stats["misses"] == 6  # each request is counted once
    assert stats["bytes"] > stats["misses"] * sum(BYTES)  # because one was read again


def test_after_a_failure_a_use_reads_nothing_and_verify_raises(file):
    bank, reads = make_bank(file, 4), _ext.SlotReads()
    with pytest.raises(RuntimeError, match="there are 16 experts"):
        mx.eval(resolve(bank, [16], reads)[1])
    assert "layer 7, expert 16" in reads.error
    copied, fresh = copy.deepcopy(reads), _ext.SlotReads()
    assert copied.error == reads.error
    assert fresh.error == ""
    mx.eval(resolve(bank, [1, 2], reads)[1])
    assert bank.resident() == []
    x = mx.zeros((2, 3), mx.bfloat16)
    for failed in (reads, copied):
        y = _ext.slots_verify(failed, x + 1)
        for _ in range(2):  # asked again, it is still no result
            with pytest.raises(RuntimeError, match="there are 16 experts"):
                mx.eval(y)
    assert (_ext.slots_verify(fresh, x + 1) == 1).all().item()


def test_what_is_overwritten_was_released(file):
    """A graph evaluated asynchronously has the right result though others follow at once."""
    bank = make_bank(file, 2)
    reads = []
    for i in range(60):
        experts = [i % EXPERTS, (i * 5 + 1) % EXPERTS]
        use, slots = resolve(bank, experts)
        read = bank.arrays[0][slots[0]].max(axis=-1)
        read = use.release(read, slots)
        del use, slots
        mx.async_eval(read)
        reads.append((experts, read))
    for experts, read in reads:
        assert read.tolist() == experts


def test_an_expert_that_cannot_be_read_is_read_again_later(file, tmp_path):
    sums = [_ext.checksum([bytes([e]) * BYTES[0], bytes([e]) * BYTES[1]]) for e in range(EXPERTS)]
    wrong = list(sums)
    wrong[5] ^= 1
    bank = make_bank(file, 4, checksums=wrong)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer 7, expert 5: .*experts\.bin.*checksum"):
            request(bank, [5, 6])
        assert bank.resident() == [6]
    assert holds(bank, request(bank, [1, 2, 3, 6]), [1, 2, 3, 6])
    assert holds(make_bank(file, 4, checksums=sums), request(bank, [1]), [1]) is not None


def test_a_file_that_shrinks_or_changes_is_noticed(file):
    bank = make_bank(file, 3)
    request(bank, [0])
    with file.open("r+b") as f:
        f.truncate(8 * sum(BYTES))
    with pytest.raises(RuntimeError, match=r"expert 9: .*truncated"):
        request(bank, [9])
    with pytest.raises(RuntimeError, match=r"expert 1: .*written to while it was in use"):
        request(bank, [1])
    assert holds(bank, request(bank, [0]), [0])


def test_a_file_that_is_removed_is_still_read(file):
    bank = make_bank(file, 3)
    file.unlink()
    assert holds(bank, request(bank, [9, 10]), [9, 10])


@pytest.mark.parametrize(
    ("experts", "message"),
    [([16], "there are 16 experts"), ([-1], "there are 16 experts"), ([1, 2, 3], "larger bank")],
)
def test_impossible_requests(file, experts, message):
    bank = make_bank(file, 2)
    with pytest.raises(RuntimeError, match=message):
        request(bank, experts)
    assert holds(bank, request(bank, [4]), [4])


def test_impossible_banks(file):
    with pytest.raises(ValueError, match="16 experts takes 1 to 16 slots but is given 17"):
        make_bank(file, 17)
    with pytest.raises(ValueError, match="policy must be learned, lru, s3fifo or pinned but is"):
        make_bank(file, 4, policy="fifo")
    with pytest.raises(ValueError, match="no room for 2 spare and 2 pinned"):
        make_bank(file, 4, policy="pinned", spares=2, pins=[1, 2])
    outside = [(0, file.stat().st_size)] * (2 * EXPERTS)
    with pytest.raises(ValueError, match=r"expert 0: its 4096 bytes at 67136 lie outside"):
        make_bank(file, 4, locations=outside)
    with pytest.raises(RuntimeError, match=r"experts\.bin: 67136 bytes, expected 5"):
        _ext.SlotFiles([str(file)], [5], False)
    with pytest.raises(RuntimeError, match="none: No such file"):
        _ext.SlotFiles([str(file.with_name("none"))], [5], False)
    with pytest.raises(ValueError, match="split of whole 4096-byte"):
        _ext.SlotReader(4, 1000)


def test_lookahead_uses_spare_slots_only(file):
    bank = make_bank(file, 4, spares=2)
    request(bank, [0, 1])
    x = mx.zeros((1, 4))
    mx.eval(_ext.slots_prefetch(bank, mx.array([[1, 5, 6, 7]], mx.int32), x))
    assert bank.resident() == [0, 1, 5, 6]
    assert holds(bank, request(bank, [0, 5]), [0, 5])  # 1 gives way, as for a miss
    stats = bank.stats()
    assert (stats["hits"], stats["misses"], stats["prefetches"]) == (2, 2, 2)
    assert bank.resident() == [0, 5, 6]
    mx.eval(_ext.slots_prefetch(bank, mx.array([[8, 9, 10]], mx.int32), x))
    assert {0, 5} < set(bank.resident())
    assert holds(bank, request(bank, [0, 5]), [0, 5])


def test_requests_are_recorded(file):
    bank = make_bank(file, 4)
    request(bank, [9])
    assert bank.take_requests() == []
    request(bank, [1, 9])
    (recorded,) = bank.take_requests()
    assert recorded.pop("wait_us") >= 0
    assert recorded == {
        "token": 1, "experts": [1, 9], "top_k": 2, "hits": 1, "misses": 1, "bytes": sum(BYTES),
    }  # fmt: skip


def build(tmp_path, output, *arguments):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / output
    subprocess.run([compiler, "-std=c++20", "-O1", *arguments, "-o", program], check=True)
    return program


@pytest.mark.skipif(sys.platform != "linux", reason="ThreadSanitizer as g++ has it")
def test_concurrent_requests_are_clean_under_thread_sanitizer(tmp_path):
    """There are many threads, failing reads and requests that are dropped half way."""
    sources = [ROOT / "csrc" / "slots" / f"{name}.cpp" for name in CORE]
    if not sources[0].exists():
        pytest.skip("no source tree")
    stress = ROOT / "tests" / "cpp" / "slots_stress.cpp"
    flags = ("-g", "-fsanitize=thread", "-I", ROOT / "csrc")
    program = build(tmp_path, "stress", *flags, stress, *sources)
    file = tmp_path / "stress.bin"
    file.write_bytes(b"".join(bytes([e]) * sum(BYTES) for e in range(32)))
    cases = ((4, 0, "lru"), (13, 0, "lru"), (16, 3, "s3fifo"), (20, 2, "pinned"))
    for slots, spares, policy in (*cases, (13, 1, "learned")):
        command = [program, file, "32", str(slots), str(spares), policy, "1"]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) > 500


FAULTS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_slots import holds, make_bank, request
for direct in (False, True):
    bank = make_bank(Path({file!r}), 5, direct=direct)
    for i in range(0, 16, 4):
        experts = [i, i + 1, i + 2, i + 3]
        assert holds(bank, request(bank, experts), experts)
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
@pytest.mark.parametrize("fault", ["EINTR", "SHORT", "EIO"])
def test_interrupted_short_and_failing_reads(file, tmp_path, fault):
    shim = build(tmp_path, "faults.so", "-shared", "-fPIC", ROOT / "tests/cpp/faulty_preadv.cpp")
    code = FAULTS.format(tests=str(ROOT / "tests"), file=str(file))
    env = os.environ | {"LD_PRELOAD": str(shim), "FAULT": fault}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if fault == "EIO":
        assert "experts.bin: Input/output error" in result.stderr
    else:
        assert result.stdout == "fine\n", result.stderr
