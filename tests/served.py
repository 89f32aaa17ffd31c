"""A server in a thread of the test's own process, on any free port."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

from glm_fused.serve.app import create_app
from glm_fused.serve.server import Server, bind, url
from glm_fused.serve.settings import Settings

BUSY = ("active", "filling", "queued")


class Served:
    """A running server: ``url``, ``port``, its ``service``, and plain requests to it."""

    def __init__(self, app, sock):
        self.service, self.url, self.port = app.state.service, url(sock), sock.getsockname()[1]

    def request(self, method, path, body=None, headers=None, raw=None):
        """Status, headers and body, which is decoded where it is JSON, of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Content-Type": "application/json"} if raw is None and body is not None else {}
        data = json.dumps(body).encode() if raw is None and body is not None else raw
        try:
            connection.request(method, path, data, given | (headers or {}))
            response = connection.getresponse()
            found = response.read()
        finally:
            connection.close()
        if response.headers.get("content-type", "").startswith("application/json"):
            found = json.loads(found)
        return response.status, response.headers, found

    def idle(self, seconds=300):
        """Wait until nothing is generated any more."""
        end = time.monotonic() + seconds
        while any(self.service.scheduler.describe().get(n) for n in BUSY):
            assert time.monotonic() < end, self.service.scheduler.describe()
            time.sleep(0.01)

    def wait_for(self, what, count, seconds=30):
        """Wait until so many requests are "active", "filling" or "queued"."""
        end = time.monotonic() + seconds
        while self.service.scheduler.describe()[what] != count:
            assert time.monotonic() < end, self.service.scheduler.describe()
            time.sleep(0.01)

    def post(self, path, body, **headers):
        """Status and body of a POST."""
        status, _, found = self.request("POST", path, body, headers)
        return status, found

    def get(self, path, **headers):
        """Status and body of a GET."""
        status, _, found = self.request("GET", path, None, headers)
        return status, found


@contextmanager
def served(engine, send_buffer=None, **settings):
    """Serve ``engine`` while the block runs, with as many bytes on the way to each client."""
    settings = Settings(**{"names": ("demo",), "port": 0, "grace": 5} | settings)
    sock = bind(settings)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    app = create_app(engine, settings)
    started = threading.Event()
    server = Server(app, settings, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield Served(app, sock)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
