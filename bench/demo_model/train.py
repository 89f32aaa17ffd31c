"""Train the GLM-5.2-shaped demo model on the Python standard library's source.

    python train.py --out demo_hf --deadline 10:25

It has three phases, as the DeepSeek-V3.2 report describes for its sparse attention:

1. *dense*: ordinary language modelling with attention over everything; the indexers are idle;
2. *warm-up*: everything is frozen but the indexers, which learn (by a KL loss) to predict where
   attention goes in their own layer and in the layers that share their selection;
3. *sparse*: attention sees only the ``index_topk`` keys that the indexers select; the model
   learns from the language-modelling loss, the indexers from the KL loss over selected keys.

The modules are those of ``transformers``' ``GlmMoeDsaForCausalLM``; only their forward pass is
restated here, in a form that is fast on a CPU and differentiable for the indexers; every run
compares the two at its start and end. The learning rate follows the fraction of the wall-clock
time used between the start and the deadline, so a paused or slowed run still ends on time with
a finished decay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint import load_state, save, save_state
from corpus import training_files
from evaluation import HeldOut, check, sample
from model import new_model
from optimizer import Optimizer, balance, load_spread
from parallel import Replicas, Workers, keep_memory
from schedule import Average, Clock, Logger, Plan, Speed, parse_deadline
from text import Batches, encode_files, kept_tokenizer
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM

PLAN = Plan()
SHORT, LONG = 256, 512  # window lengths, in tokens
SAVE_SECONDS = 300


class Run:
    """A training run: what it works on, and one method per phase."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.log = Logger()
        seconds = parse_deadline(arguments.deadline)
        self.workers = Workers(arguments.threads)
        torch.manual_seed(arguments.seed)
        texts = [file.text for file in training_files()]
        self.tokenizer = kept_tokenizer(texts, arguments.tokenizer)
        files = encode_files(self.tokenizer, texts)
        self.token_count = sum(map(len, files))
        self.held_out = HeldOut(self.tokenizer, 48, LONG)
        self.model = new_model(self.tokenizer)
        self.replicas = Replicas(self.model, self.workers)
        rates = arguments.matrix_rate, arguments.adam_rate
        self.optimizer = Optimizer(self.model, *rates, self.workers)
        self._log_setup(texts)
        check(self.model, self.held_out.windows[:1, :256], self.log)
        self.seen = self.step = 0
        self.clock = Clock(seconds)
        if arguments.state is not None and arguments.state.exists():
            self._resume()
        self.batches = Batches(files, arguments.seed + self.step)
        self.early: Path | None = arguments.early
        self.saved_at = self.log.start

    def _log_setup(self, texts: list[str]) -> None:
        tokens, size = self.token_count, sum(len(text.encode()) for text in texts)
        self.log(
            f"{len(texts)} files, {tokens} tokens, {size / tokens:.3f} bytes per token, "
            f"vocabulary {len(self.tokenizer)}"
        )
        self.log(
            f"held-out sample: {len(self.held_out.windows)} windows, "
            f"{self.held_out.bytes_per_token:.3f} bytes per token"
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        self.log(f"{parameters} parameters, threads {self.workers.count}")

    def _resume(self) -> None:
        state = load_state(self.arguments.state, self.model, self.optimizer)
        self.step, self.seen = state["step"], state["seen"]
        self.clock.resume(state["start"])
        self.log(f"resumed at step {self.step}, {self.clock.progress:.3f} of the run")

    def dense(self) -> None:
        """Phase 1: language modelling, attention over everything."""
        average, spread = Average(0.05), math.nan
        speed = Speed(self.seen)
        first = self.step
        for progress in self._steps(PLAN.dense):
            length = SHORT if progress < PLAN.long_context else LONG
            tokens = self._tokens(length)
            loss = self.replicas.backward(tokens, sparse=False, language=True, indexer=False)[0]
            factor = PLAN.rate(progress, self.step)
            self.optimizer.step(factor)
            self.optimizer.zero()
            if self.step % 100 == 0:
                spread = load_spread(self.replicas.loads)
            balance(self.model, self.replicas.loads, 0.004 * max(factor, 0.1))
            self._count(tokens)
            average.add(loss.item())
            if self.step % 20 == 0 or self.step < first + 4:
                found = f"loss {average.value:.4f} rate {factor:.3f} load {spread:.2f}"
                self._log_step("dense", found, speed)
            if self.step % 400 == 0:
                self._report(f"step {self.step}", sparse_too=False)
            self._save_early()
            self._save_sometimes()
        self._report("end of dense phase")
        self._save()

    def warm_up(self) -> None:
        """Phase 2: the indexers learn where attention goes, everything else frozen."""
        self.replicas.freeze(True)
        average = Average(0.1)
        for number, progress in enumerate(self._steps(PLAN.warm_up, least=60), start=1):
            tokens = self._tokens(LONG)
            losses = self.replicas.backward(tokens, sparse=False, language=False, indexer=True)
            span = (progress - PLAN.dense) / (PLAN.warm_up - PLAN.dense)
            self.optimizer.step_indexers(4e-3 * min(1.0, number / 10) * (1.0 - 0.8 * span))
            self.optimizer.zero()
            average.add(losses)
            if number % 10 == 0 or number < 4:
                self.log(
                    f"warm-up step {number} KL {[round(v, 4) for v in average.value.tolist()]}"
                )
        self.replicas.freeze(False)
        self._report("end of warm-up")
        self._save()

    def sparse(self) -> None:
        """Phase 3: attention over the selected keys, model and indexers learn together."""
        average, speed = Average(0.05), Speed(self.seen)
        first = self.step
        for progress in self._steps(PLAN.sparse):
            tokens = self._tokens(LONG)
            losses = self.replicas.backward(tokens, sparse=True, language=True, indexer=True)
            factor = PLAN.rate(progress, self.step)
            self.optimizer.step(factor)
            self.optimizer.step_indexers(8e-4 * min(1.0, factor / 0.35))
            self.optimizer.zero()
            balance(self.model, self.replicas.loads, 0.004 * factor)
            self._count(tokens)
            average.add(torch.stack([losses[0], losses[1:].sum()]))
            if self.step % 20 == 0 or self.step < first + 4:
                loss, kl = average.value.tolist()
                self._log_step("sparse", f"loss {loss:.4f} KL {kl:.4f} rate {factor:.3f}", speed)
            self._save_sometimes()
        self._report("end of sparse phase")
        save(self.model, self.tokenizer, self.arguments.out)

    def finish(self) -> None:
        """Check what was saved, as transformers reads and runs it."""
        out = self.arguments.out
        self.log(
            f"saved to {out}; {self.seen} tokens seen in {self.step} steps, "
            f"process {time.process_time():.0f} s"
        )
        check(self.model, self.held_out.windows[:2, :-1], self.log)
        again = GlmMoeDsaForCausalLM.from_pretrained(out, dtype=torch.float32)
        loss = self.held_out.loss(again, True, self.workers)
        self.log(f"reloaded from disk: sparse loss {loss:.4f}")
        sample(out, self.log)
        self.log(json.dumps({"tokens": self.seen, "steps": self.step, "sparse_loss": loss}))

    def _steps(self, end: float, least: int = 0) -> Iterator[float]:
        """Yield the fraction of the run used so far until ``end``, at least ``least`` times."""
        done, most = 0, self.arguments.max_steps
        while (progress := self.clock.progress) < end or done < least:
            if most and done >= most:
                return
            yield progress
            done += 1

    def _tokens(self, length: int) -> Tensor:
        return self.batches.next(self.arguments.batch_tokens // length, length)

    def _count(self, tokens: Tensor) -> None:
        self.seen += tokens[:, 1:].numel()
        self.step += 1

    def _log_step(self, phase: str, found: str, speed: Speed) -> None:
        epochs = self.seen / self.token_count
        self.log(
            f"{phase} step {self.step} tokens {self.seen} ({epochs:.2f} epochs) {found} "
            f"{speed.since_last(self.seen):.0f} tok/s"
        )

    def _report(self, name: str, sparse_too: bool = True) -> None:
        """Log the held-out loss of dense and, once the indexers have learnt, sparse attention."""
        kinds = {"dense": False} | ({"sparse": True} if sparse_too else {})
        losses = {
            kind: self.held_out.loss(self.model, sparse, self.workers)
            for kind, sparse in kinds.items()
        }
        text = ", ".join(f"{kind} {self.held_out.describe(loss)}" for kind, loss in losses.items())
        self.log(f"held-out ({name}): {text}")

    def _save(self) -> None:
        """Write the checkpoint, and the state to resume from."""
        save(self.model, self.tokenizer, self.arguments.out)
        if self.arguments.state is not None:
            counts = {"start": self.clock.start, "step": self.step, "seen": self.seen}
            save_state(self.arguments.state, self.model, self.optimizer, counts)
        self.saved_at = time.monotonic()

    def _save_sometimes(self) -> None:
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self._save()

    def _save_early(self) -> None:
        """Write, once, a checkpoint for others to begin working with."""
        due = self.log.start + self.arguments.early_minutes * 60
        if self.early is not None and time.monotonic() > due:
            save(self.model, self.tokenizer, self.early)
            self.log(f"early checkpoint written to {self.early}")
            self.early = None


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint")
    add("--state", type=Path, help="file for the training state; resumed from if present")
    add("--early", type=Path, help="folder of an early checkpoint of the same shape")
    add("--early-minutes", type=float, default=12.0)
    add("--tokenizer", type=Path, help="folder to keep the tokenizer in, read if present")
    add("--deadline", default="70", help="HH:MM, or minutes from now")
    add("--threads", type=int, default=os.cpu_count())
    add("--batch-tokens", type=int, default=2048)
    add("--matrix-rate", type=float, default=0.02)
    add("--adam-rate", type=float, default=4e-3)
    add("--max-steps", type=int, default=0, help="end each phase here (a test)")
    add("--seed", type=int, default=0)
    keep_memory()
    run = Run(parser.parse_args())
    run.dense()
    run.warm_up()
    run.sparse()
    run.finish()


if __name__ == "__main__":
    main()
