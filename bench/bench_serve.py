"""Asks servers for texts, from several clients at once: `glm-fused serve` beside mlx-lm's server.

    python bench/bench_serve.py                                    # the bundled model
    python bench/bench_serve.py --clients 1 16 --draft auto        # and with drafts
    python bench/bench_serve.py --prompt-tokens 1024 --tokens 32   # mostly prompts
    python bench/bench_serve.py --stock --repeats 1 --tokens 16    # beside stock mlx-lm, too
    python bench/bench_serve.py --model PATH --json

"ours" is glm-fused serve; "ours in mlx-lm" is mlx-lm's own server with our model in it (python -m
glm_fused.mlx_lm server); "mlx-lm" is that server as it comes, on the bundled model with an indexer
on every layer (peers/full_layers.py), which then all of them serve. Each is a process that lives
as long as the bench, as its defaults have it.

In a round each client asks for one text, all at the same moment, on connections that are open by
then. A text is so many greedy tokens after a prompt of code, which no server has seen before, so
caches of earlier requests give nothing. The servers take turns, round by round, with the same
prompts; a first round of each number of clients warms up. Chosen are prompts after which
`Engine.generate` does not stop earlier. The texts of ours have to be what it gives, with drafts,
too, or the bench ends.

For each number of tokens and clients it prints, over the rounds, the median of tokens/s, those of
all clients by the time from the first request to the last token; over the texts of all rounds, the
median and the 95th percentile of the ms to the first piece of text, and of the ms a token from
there to the end; the part of the texts that are `Engine.generate`'s; and the median of how many
times as long as ours a server took for a token.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from common import median, report
from peers.full_layers import write_full_layers
from serve_clients import MODEL, Answer, Server

from glm_fused import Engine
from glm_fused.checkpoint.paths import checkpoint_path

sys.path.insert(0, str(Path(__file__).parent / "demo_model"))
from corpus import held_out_files, unseen_files

OURS = "ours"
COLUMNS = {
    "server": "",
    "tokens": "d",
    "clients": "d",
    "tokens/s": ".1f",
    "first ms": ".1f",
    "first ms p95": ".1f",
    "ms/token": ".2f",
    "ms/token p95": ".2f",
    "same": ".2f",
    "x ours": ".2f",
}
# Of each number of tokens and of clients the rounds, the warm-up first.
Plan = dict[tuple[int, int], list[list["Text"]]]


class Text(NamedTuple):
    """A prompt, and what follows it."""

    prompt: str
    expected: str


class Round(NamedTuple):
    """The answers of one round, and how many of them are what was expected."""

    answers: list[Answer]
    same: int

    @property
    def rate(self) -> float:
        """Tokens a second, of all clients."""
        began = min(answer.began for answer in self.answers)
        last = max(answer.last for answer in self.answers)
        return sum(answer.tokens for answer in self.answers) / (last - began)


def prompts(engine: Engine, size: int) -> Iterator[str]:
    """Code that has ``size`` tokens, piece by piece; no piece comes twice."""
    step = 8 * size  # characters, more than so many tokens have
    seen = set()
    for file in itertools.chain(held_out_files(), unseen_files()):
        for first in range(0, len(file.text), step):
            tokens = engine.encode(file.text[first : first + step], raw=True)[:size]
            text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
            whole = len(tokens) == size and engine.encode(text, raw=True) == tokens
            if whole and text not in seen:
                seen.add(text)
                yield text


def texts(engine: Engine, pieces: Iterator[str], tokens: int) -> Iterator[Text]:
    """Prompts after which the model does not stop before so many tokens, and what follows them."""
    for prompt in pieces:
        found = engine.generate(prompt, max_tokens=tokens, temp=0.0, raw=True)
        if found.finish_reason == "length":
            yield Text(prompt, found.text)


def plan(path: Path, options: argparse.Namespace) -> Plan:
    """What is asked for. Raises SystemExit where there is not enough text for prompts."""
    with Engine(path) as engine:
        pieces = prompts(engine, options.prompt_tokens)
        found = {
            (tokens, clients): [
                list(itertools.islice(texts(engine, pieces, tokens), clients))
                for _ in range(options.repeats + 1)
            ]
            for tokens in options.tokens
            for clients in options.clients
        }
    for (_, clients), rounds in found.items():
        if len(rounds[-1]) < clients:
            raise SystemExit("Python's library has too few prompts of --prompt-tokens for so many.")
    return found


def start(options: argparse.Namespace, path: Path, folder: Path) -> list[Server]:
    """The servers, ours first; their logs go into ``folder``."""
    model = ["--model", str(path)]
    ours = ["glm_fused", "serve", *model, "--name", MODEL, "--no-api-key"]
    commands = {OURS: ours}
    for draft in options.draft:
        commands[f"{OURS}, draft {draft}"] = [*ours, "--draft", draft]
    commands["ours in mlx-lm"] = ["glm_fused.mlx_lm", "server", *model]
    if options.stock:
        commands["mlx-lm"] = ["mlx_lm", "server", *model]
    return [
        Server.start(name, command, folder / f"{i}.log")
        for i, (name, command) in enumerate(commands.items())
    ]


def take(server: Server, asked: list[Text], tokens: int, options: argparse.Namespace) -> Round:
    """A round. Raises SystemExit for a wrong text of ours, and for tokens that do not fit."""
    answers = server([text.prompt for text in asked], tokens)
    for answer in answers:
        if answer.prompt_tokens != options.prompt_tokens:
            found = f"{answer.prompt_tokens} tokens, expected {options.prompt_tokens}"
            raise SystemExit(f"{server.name} takes a prompt as {found}.")
    pairs = zip(answers, asked, strict=True)
    same = sum(answer.text == text.expected for answer, text in pairs)
    if server.name.split(",")[0] == OURS and same < len(asked):
        raise SystemExit(f"{server.name}: {len(asked) - same} of {len(asked)} texts changed.")
    return Round(answers, same)


def row(server: Server, rounds: list[Round], ours: list[Round]) -> dict[str, Any]:
    """What is printed of a server with one number of clients."""
    answers = [answer for each in rounds for answer in each.answers]
    firsts = [1e3 * (answer.first - answer.began) for answer in answers]
    each = [1e3 * (a.last - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1]
    pairs = zip(rounds, ours, strict=True)
    return {
        "server": server.name,
        "tokens": answers[0].tokens,
        "clients": len(rounds[0].answers),
        "tokens/s": median([each.rate for each in rounds]),
        "first ms": median(firsts),
        "first ms p95": float(np.percentile(firsts, 95)),
        "ms/token": median(each) if each else None,
        "ms/token p95": float(np.percentile(each, 95)) if each else None,
        "same": sum(each.same for each in rounds) / len(answers),
        "x ours": median([our.rate / their.rate for their, our in pairs]),
    }


def measure(
    servers: list[Server], asked: Plan, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each number of tokens, clients and server; the first server is ours."""
    rows = []
    for (tokens, _), (warm_up, *turns) in asked.items():
        rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
        for server in servers:
            take(server, warm_up, tokens, options)
        for turn in turns:
            for server in servers:
                rounds[server.name].append(take(server, turn, tokens, options))
        rows += [row(server, rounds[server.name], rounds[OURS]) for server in servers]
    return rows


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", default="demo", help="default: the bundled model")
    add("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--tokens", type=int, nargs="+", default=[24, 128], help="of each text")
    add("--prompt-tokens", type=int, default=96, help="of each prompt")
    add("--draft", nargs="+", default=[], help="ours with drafts, too: auto, or numbers")
    add("--repeats", type=int, default=5, help="timed rounds of each number of clients")
    add("--stock", action="store_true", help="beside stock mlx-lm, on a model that it can load")
    add("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if min(*options.clients, *options.tokens, options.prompt_tokens, options.repeats) < 1:
        parser.error("--clients, --tokens, --prompt-tokens and --repeats are 1 or more.")
    if options.stock and options.model != "demo":
        parser.error("--stock takes another model than --model.")
    return options


def main() -> None:
    options = parse()
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        path = checkpoint_path(options.model)
        if options.stock:
            path = folder / "full_layers"
            write_full_layers(path)
        asked = plan(path, options)
        servers = start(options, path, folder)
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.ready()
        rows = measure(servers, asked, options)
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
