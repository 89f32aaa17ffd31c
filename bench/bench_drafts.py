"""Generates text with drafts and without, prompt by prompt in turn: what drafts give, and cost.

    python bench/bench_drafts.py                              # the bundled model
    python bench/bench_drafts.py --draft auto 1 2 3 4         # fixed depths, too
    python bench/bench_drafts.py --draft-from lookup          # another source
    python bench/bench_drafts.py --texts code --prompts 20 --tokens 500

Texts suit drafts more or less: ``code``, the beginnings of held-out files, with which the bundled
model goes on greedily; ``prose``, those of the pages in ``docs``; ``sampled``, ``code`` at
temperature 1; ``noise``, prompts of random tokens at temperature 2, which hardly any draft can
foresee. Where tokens are chosen greedily they are the same both ways, which is checked.

For each kind and depth it prints tokens/s without drafts and with them (all tokens after the first
of all prompts, by the seconds they took), the ratio of the two (a text's is the median of its
repeats): the median over the texts and the lowest of them, tokens a step, and how many drafts of
each position stayed of those that were reached. On a machine with other work only many repeats tell
a text that does not suit from one that was interrupted; ``--draft off`` says what remains of that.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import median, report

import glm_fused
from glm_fused import Engine, EngineOptions
from glm_fused.generation.generate import Completion

sys.path.insert(0, str(Path(__file__).parent / "demo_model"))
from corpus import held_out_files

PROMPT_TOKENS = 96
COLUMNS = {
    "text": "",
    "draft": "",
    "from": "",
    "prompts": "d",
    "plain tokens/s": ".0f",
    "tokens/s": ".0f",
    "ratio": ".2f",
    "lowest": ".2f",
    "tokens/step": ".2f",
    "acceptance": "",
}


@dataclass
class Kind:
    """A kind of text: its prompts, and how it goes on."""

    prompts: list[list[int]]
    temp: float


def kinds(engine: Engine, count: int) -> dict[str, Kind]:
    """The kinds of texts, with ``count`` prompts each."""
    texts = [engine.encode(file.text[:2000], raw=True) for file in held_out_files()]
    code = [tokens[:PROMPT_TOKENS] for tokens in texts if len(tokens) > PROMPT_TOKENS][:count]
    if len(code) < count:
        raise SystemExit(f"--prompts: there are {len(code)} held-out files of enough tokens.")
    draw = random.Random(0)
    vocabulary = engine.model.args.vocab_size
    noise = [[draw.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in code]
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    prose = [engine.encode(page.read_text()[:2000], raw=True)[:PROMPT_TOKENS] for page in pages]
    return {
        "code": Kind(code, 0.0),
        "prose": Kind(prose[:count], 0.0),
        "sampled": Kind(code, 1.0),
        "noise": Kind(noise, 2.0),
    }


def seconds(completion: Completion) -> float:
    """The seconds of all tokens but the first, which ends the prompt."""
    rate = completion.generation_tps
    return 0.0 if rate is None else (len(completion.tokens) - 1) / rate


class Sums:
    """What generation with one kind of draft has given so far."""

    def __init__(self) -> None:
        self.plain = self.drafted = (0, 0.0)
        self.ratios: list[list[float]] = []  # of each text
        self.steps = 0.0
        self.reached: list[float] = []
        self.kept: list[float] = []

    def begin(self) -> None:
        """Go on with another text."""
        self.ratios.append([])

    def add(self, plain: Completion, drafted: Completion) -> None:
        """Count a text that was generated both ways."""
        for name, completion in (("plain", plain), ("drafted", drafted)):
            tokens, took = getattr(self, name)
            took += seconds(completion)
            setattr(self, name, (tokens + len(completion.tokens) - 1, took))
        if plain.generation_tps and drafted.generation_tps:
            self.ratios[-1].append(drafted.generation_tps / plain.generation_tps)
        if drafted.drafts is None:
            self.steps += len(drafted.tokens) - 1
            return
        if drafted.drafts["tokens_per_step"]:
            self.steps += (len(drafted.tokens) - 1) / drafted.drafts["tokens_per_step"]
        self._count(drafted.drafts)

    def _count(self, drafts: dict[str, Any]) -> None:
        reached, kept = drafts["reached"], drafts["kept"]
        for sums, counts in ((self.reached, reached), (self.kept, kept)):
            sums.extend([0] * (len(counts) - len(sums)))
            for i, count in enumerate(counts):
                sums[i] += count

    def row(self) -> dict[str, Any]:
        rates = [k / r for k, r in zip(self.kept, self.reached, strict=True) if r]
        ratios = [median(text) for text in self.ratios if text]
        return {
            "prompts": len(ratios),
            "plain tokens/s": self.plain[0] / self.plain[1],
            "tokens/s": self.drafted[0] / self.drafted[1],
            "ratio": median(ratios),
            "lowest": min(ratios),
            "tokens/step": self.drafted[0] / self.steps,
            "acceptance": " ".join(f"{rate:.2f}" for rate in rates) or None,
        }


def measure(
    engines: dict[str, Engine], plain: Engine, kind: Kind, tokens: int, repeats: int
) -> dict[str, Sums]:
    """Generate every prompt's text with each engine, the plain one beside each."""
    sums = {name: Sums() for name in engines}
    for prompt in kind.prompts:
        for name, engine in engines.items():
            sums[name].begin()
            for turn in range(repeats):
                how: dict[str, Any] = {"max_tokens": tokens, "temp": kind.temp, "seed": 0}
                turns = (plain, engine) if turn % 2 else (engine, plain)
                pair = [each.generate(prompt, **how) for each in turns]
                pair = pair if turn % 2 else pair[::-1]
                if kind.temp == 0 and pair[0].tokens != pair[1].tokens:
                    raise SystemExit(f"--draft {name} changed a text.")
                if len(pair[0].tokens) > 1 and len(pair[1].tokens) > 1:
                    sums[name].add(*pair)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="default: the bundled model")
    parser.add_argument("--draft", nargs="+", default=["auto"], help="auto, numbers, or off")
    parser.add_argument("--draft-from", help="default: what generate takes")
    parser.add_argument("--texts", nargs="+", help="default: all kinds")
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--tokens", type=int, default=300, help="of each text")
    parser.add_argument("--repeats", type=int, default=1, help="of each text")
    parser.add_argument("--threads", type=int, help="default: every processor")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.threads:
        glm_fused.set_num_threads(options.threads)
    plain, engines = Engine(options.model), {}
    for draft in options.draft:
        depth = int(draft) if draft.isdigit() else draft
        source = None if draft == "off" else options.draft_from
        how = EngineOptions(draft=depth, draft_from=source)
        engines[draft] = Engine(options.model, how)
    rows = []
    for text, kind in kinds(plain, options.prompts).items():
        if options.texts and text not in options.texts:
            continue
        warm_up = Kind(kind.prompts[:1], kind.temp)
        measure(engines, plain, warm_up, 64, 1)
        found = measure(engines, plain, kind, options.tokens, options.repeats)
        for draft, sums in found.items():
            drafts = engines[draft].drafts
            source = None if drafts is None else drafts.source
            rows.append({"text": text, "draft": draft, "from": source} | sums.row())
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
