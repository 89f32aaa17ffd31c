"""How ranks meet: the others may be late, not come at all, or be strangers."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import pytest
import ring

from glm_fused.parallel.peer import Peer
from glm_fused.parallel.watch import Watch

GENERATE = ["generate", "--model", "demo", "--raw", "--shard", "tensor", "--prompt", "x"]
# A rank that soon stops to wait for others: to join it, or once they have.
SOON = """
import sys
from glm_fused.cli import main
from glm_fused.parallel import agreement, meeting
def hasten():
    meeting.LIMIT = 0.7
def joined(join=agreement.join_group):
    group = join()
    hasten()
    return group
agreement.join_group = joined
if sys.argv.pop(1) == "at once":
    hasten()
sys.exit(main(sys.argv[1:]))
"""
JOINS = "import time, glm_fused.parallel.agreement as a; a.join_group(); time.sleep(100)"


@pytest.mark.parametrize(("when", "other"), [("at once", "pass"), ("joined", JOINS)])
def test_a_rank_that_does_not_come_ends_those_that_wait(tmp_path, when, other):
    """One that is never started, and one that stands still before they watch each other."""
    ranks = ring.start([["-c", SOON, when, *GENERATE], ["-c", other]], tmp_path)
    try:
        _, errors = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert (ranks[0].returncode, errors.count("\n")) == (2, 1)
    assert errors.startswith("glm-fused: error: [shard] other ranks did not come within 0.7 s: ")


class TestMeeting:
    """Rank 0 waits for the others, and strangers connect as well."""

    def watch(self, size=3):
        return Watch(SimpleNamespace(rank=lambda: 0, size=lambda: size))

    def accept(self, watch, server, say):
        """Have the lines said, each on a connection of its own; returns these."""
        address = server.getsockname()
        lines = [socket.create_connection(address) for _ in say]
        for connection, line in zip(lines, say, strict=True):
            connection.sendall(line)
        watch._accept(server, "token")
        return lines

    def test_strangers_keep_nobody_waiting(self):
        watch, server = self.watch(), socket.create_server(("127.0.0.1", 0))
        strangers = [b"", b"GET / HTTP/1.1\n", b"\xff\xfe 1\n", b"token-not 2\n", b""]
        began = time.monotonic()
        lines = self.accept(watch, server, [*strangers, b"token 1\n", b"token 2\nhello\n"])
        assert time.monotonic() - began < 5  # the silent ones are waited for in their threads
        assert set(watch._peers) == {1, 2}
        assert next(watch._peers[2].lines) == "hello"  # which came along with the token
        lines[5].sendall(b"and 1\n")
        assert next(watch._peers[1].lines) == "and 1"
        for line in lines:
            line.close()

    def test_a_rank_that_does_not_come_is_named(self, monkeypatch):
        monkeypatch.setattr("glm_fused.parallel.watch.LIMIT", 1)
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            pytest.raises(RuntimeError, match=r"rank 2 did not connect to \('127.0.0.1'"),
        ):
            self.accept(self.watch(), server, [b"token 1\n", b"tokem 2\n"])

    def test_a_peer_that_says_nothing_is_noticed(self, monkeypatch):
        monkeypatch.setattr("glm_fused.parallel.peer.PERIOD", 0.02)
        ours, theirs = socket.socketpair()
        peer = Peer(ours)
        theirs.sendall(b"a\nb")
        assert next(peer.lines) == "a"
        with pytest.raises(TimeoutError):
            next(peer.lines)
        theirs.close()
