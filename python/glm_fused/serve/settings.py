"""How a server answers: its names, whom it lets in, and its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields

from ..validation import show

HOST, PORT = "127.0.0.1", 8080
_POSITIVE = ("max_batch", "max_queue", "max_body_bytes", "timeout", "time_limit", "max_tokens")


@dataclass(frozen=True)
class Settings:
    """How a server answers; the command line's options have the same names.

    Attributes:
        names: what requests may call the model; the first is the one that answers name.
        host: the address that the server is bound to.
        port: its port; 0: any that is free.
        api_key: what a client has to know; None: nothing.
        allowed_hosts: further names that a Host header may have, besides loopback's and ``host``.
        cors_origins: pages that may use the server from a browser, such as "https://a.example";
            "*" for all.
        max_batch: how many requests are generated for at a time.
        max_queue: how many more may wait.
        max_tokens: how many tokens an answer has at most where its request does not say; None: as
            many as the context has room for.
        max_body_bytes: the largest body of a request.
        timeout: seconds that a client may take to send a request, or for which it may read nothing.
        time_limit: seconds that a request may take, from its arrival to its last token.
        prompt_cache_dir: where caches of earlier requests are kept, too; None: in memory only, of
            which the engine's ``prompt_cache`` says how much.
        grace: seconds that running requests have to end when the server is told to.

    Raises ValueError, naming the setting, for a value that it cannot have.
    """

    names: tuple[str, ...]
    host: str = HOST
    port: int = PORT
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_batch: int = 16
    max_queue: int = 256
    max_tokens: int | None = None
    max_body_bytes: int = 16 << 20
    timeout: float = 60.0
    time_limit: float = 3600.0
    prompt_cache_dir: str | None = None
    grace: int = 10

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError(f"[serve] names is {show(self.names)}, expected one or more names.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"[serve] {name} is {show(value)}, expected more than 0.")
        if self.api_key is not None and not self.api_key.isascii():
            raise ValueError("[serve] api_key has characters beyond ASCII, which no header takes.")
        if self.api_key is not None and len(self.api_key.split()) != 1:
            raise ValueError("[serve] api_key is empty or has spaces, expected one word.")
        for origin in self.cors_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                expected = "a scheme, a host and perhaps a port, such as https://a.example"
                raise ValueError(f"[serve] cors_origins has {show(origin)}, expected {expected}.")

    @property
    def name(self) -> str:
        """What answers call the model."""
        return self.names[0]

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def describe(self) -> dict[str, object]:
        """The settings as a JSON-ready dictionary, without the key."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, that others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
