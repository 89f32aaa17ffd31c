"""Train an MTP layer for the bundled model, which stays as it is, and add it to the checkpoint.

    python train_mtp.py --model ../../python/glm_fused/demo_model --out demo_mtp --deadline 60

The layer learns from the model's own distributions, over drafts that chain as they do when they
are used: the second draft's row has the first's state in the place of the model's. Three phases:

1. *dense*: attention over everything, weights in float32;
2. *packed*: the forward pass has the weights as the checkpoint will pack them, and the indexer
   learns, by a KL loss, where the layer attends;
3. *sparse*: attention sees only the keys that the indexer selects.

What is written is read back and measured: how many drafts of held-out text, which the model itself
made of beginnings, are what the model says.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from corpus import held_out_files, training_files, unseen_files
from mtp_forward import Draft, Shape, Weights
from mtp_states import AT_ONCE, LENGTH, PROMPT, States, drafted, make_states
from mtp_weights import Checkpoint, as_packed, first_weights
from optimizer import Muon
from parallel import keep_memory
from schedule import Average, Clock, Logger, parse_deadline
from torch import Tensor, nn

SHORT, LONG = 256, 512  # rows of a window, of the first two phases and of the last
SAVE_SECONDS = 600


class Batch(NamedTuple):
    """Windows: tokens int64 [b, rows + 1] and the model's states of them [b, rows + 1, hidden]."""

    tokens: Tensor
    hidden: Tensor


class Batches:
    """Endless windows of pieces of text, in a new order in every epoch."""

    def __init__(self, states: States, seed: int) -> None:
        self.tokens = torch.from_numpy(states.tokens)
        self.hidden = torch.from_numpy(states.hidden.view("int16")).view(torch.bfloat16)
        self.random = torch.Generator().manual_seed(seed)
        self.left: list[int] = []
        self.epochs = 0

    def next(self, rows: int, count: int) -> Batch:
        """``count`` windows, each from another piece."""
        if len(self.left) < count:
            self.left = torch.randperm(len(self.tokens), generator=self.random).tolist()
            self.epochs += 1
        chosen, self.left = self.left[:count], self.left[count:]
        room = self.tokens.shape[1] - rows
        starts = torch.randint(room, (count,), generator=self.random).tolist()
        return self.windows([(i, start) for i, start in zip(chosen, starts, strict=True)], rows)

    def windows(self, places: list[tuple[int, int]], rows: int) -> Batch:
        """The windows that begin at these places of these pieces."""
        tokens = torch.stack([self.tokens[i, s : s + rows + 1] for i, s in places])
        hidden = torch.stack([self.hidden[i, s : s + rows + 1] for i, s in places])
        return Batch(tokens.long(), hidden.float())


class Frozen:
    """What drafts share with the model: its embedding and its head."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.embedding = checkpoint.floats("model.embed_tokens.weight")
        self.head = checkpoint.floats("lm_head.weight")

    def drafts(self, draft: Draft, batch: Batch, count: int) -> list[Tensor]:
        """The logits [b, rows - s, vocab] of drafts s = 0 .. count - 1 of all chains."""
        embedded = F.embedding(batch.tokens[:, 1:], self.embedding)
        hidden, found = batch.hidden[:, :-1], []
        for s in range(count):
            state = draft.step(embedded[:, s:], hidden)
            found.append(F.linear(state, self.head))
            hidden = state[:, :-1]
        return found


class Optimizer:
    """Muon for the matrices, Adam for the norms, the router and the indexer."""

    def __init__(self, weights: Weights, matrix_rate: float, adam_rate: float) -> None:
        self.bias = weights["mlp.gate.e_score_correction_bias"]
        learnt = {name: w for name, w in weights.items() if w is not self.bias}
        apart = {name: w for name, w in learnt.items() if w.ndim < 2 or "mlp.gate." in name}
        apart |= {name: w for name, w in learnt.items() if ".indexer." in name}
        matrices = {name: w for name, w in learnt.items() if name not in apart}
        self.muon, self.matrix_rate = Muon(matrices, 0.95, 0.0), matrix_rate
        self.adam = torch.optim.AdamW(
            apart.values(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.adam_rate, self.parameters = adam_rate, list(learnt.values())

    def step(self, factor: float, load: Tensor) -> None:
        """Update at ``factor`` times the rates, and nudge the experts' biases against ``load``."""
        self.muon.step(self.matrix_rate * factor)
        for group in self.adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        error = load.float().mean() - load.float()
        self.bias += 0.004 * factor * error.sign()
        for parameter in self.parameters:
            parameter.grad = None


class Run:
    """A training run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.log = arguments, Logger()
        self.clock = Clock(parse_deadline(arguments.deadline))
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(arguments.seed)
        self.checkpoint = Checkpoint(arguments.model)
        self.shape = Shape.of(self.checkpoint.config)
        self.frozen = Frozen(self.checkpoint)
        self.batches = Batches(self._states("train", arguments.pieces), arguments.seed)
        self.held_out_states = self._states("held-out", arguments.held_out)
        self.held_out = Batches(self.held_out_states, arguments.seed)
        self.weights = {
            name: tensor if name.endswith("_bias") else nn.Parameter(tensor)
            for name, tensor in first_weights(self.checkpoint).items()
        }
        rates = arguments.matrix_rate, arguments.adam_rate
        self.optimizer = Optimizer(self.weights, *rates)

    def _states(self, kind: str, count: int) -> States:
        """States of ``count`` pieces of text: kept in a file, made where there is none."""
        file = self.arguments.states / f"{kind}.npz"
        if not file.exists():
            import glm_fused

            model, tokenizer = glm_fused.load(self.arguments.model)
            learnt = [*training_files(), *unseen_files()]
            files = held_out_files() if kind == "held-out" else learnt
            own = 4 if kind == "held-out" else 1
            parts = make_states(model, tokenizer, files, own, self.arguments.seed)
            States.joined(itertools.islice(parts, -(-count // AT_ONCE))).save(file)
        states = States.load(file)
        self.log(f"{kind}: {states.tokens.size} tokens")
        return states

    def train(self) -> None:
        """All phases."""
        step, saved = 0, self.log.seconds
        losses = [Average(0.1) for _ in range(self.arguments.drafts)]
        while (progress := self.clock.progress) < 1.0:
            packed = progress >= self.arguments.packed
            sparse = progress >= self.arguments.sparse
            rows = LONG if sparse else SHORT
            batch = self.batches.next(rows, self.arguments.batch_tokens // rows)
            weights = as_packed(self.weights) if packed else self.weights
            draft = Draft(weights, self.shape, sparse, packed)
            found = self._losses(draft, batch, 1 + step % self.arguments.drafts)
            total = torch.stack(found).sum()
            if draft.indexer_loss is not None:
                total = total + draft.indexer_loss
            total.backward()
            rate = min(1.0, (step + 1) / 20) * (1.02 - progress)
            self.optimizer.step(rate, draft.load)
            for average, loss in zip(losses, found, strict=False):
                average.add(loss.item())
            step += 1
            if step % 12 == 0:
                self._log_step(step, progress, losses, draft)
            if self.log.seconds - saved > SAVE_SECONDS:
                saved = self.log.seconds
                self.write()

    def _losses(self, draft: Draft, batch: Batch, count: int) -> list[Tensor]:
        """Each draft's mean KL divergence from what the model says."""
        with torch.no_grad():
            target = F.linear(batch.hidden[:, 1:], self.frozen.head).softmax(-1)
            entropy = -torch.xlogy(target, target).sum(-1)
        losses = []
        for s, logits in enumerate(self.frozen.drafts(draft, batch, count)):
            cross = -(target[:, s:] * logits.log_softmax(-1)).sum(-1)
            losses.append((cross - entropy[:, s:]).mean())
        return losses

    def _log_step(self, step: int, progress: float, losses: list[Average], draft: Draft) -> None:
        found = ", ".join(f"{average.value:.3f}" for average in losses)
        kl = "" if draft.indexer_loss is None else f" indexer {draft.indexer_loss.item():.3f}"
        self.log(
            f"step {step} ({progress:.3f} of the run, epoch {self.batches.epochs}):"
            f" KL of drafts {found}{kl}"
        )

    def write(self) -> None:
        """Write the checkpoint with the layer as it is, read it back and measure it."""
        out = self.arguments.out
        out.mkdir(exist_ok=True)
        for file in self.checkpoint.folder.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                shutil.copy(file, out / file.name)
        self.checkpoint.write(self.weights, out)
        written = Checkpoint(out)
        rates = self.acceptance(written.layer_weights(written.layer))
        shares = ", ".join(f"{rate:.3f}" for rate in rates)
        self.log(f"{out}: drafts that the model agrees with, if with all before: {shares}")

    @torch.no_grad()
    def check(self) -> None:
        """Compare what is written, as `glm_fused` drafts with it, with the forward pass here."""
        import glm_fused

        model, _ = glm_fused.load_model(self.arguments.out, mtp=True)
        rest = 100  # tokens of the piece that the drafts which chain may go on to
        theirs = map(torch.from_numpy, drafted(model, self.held_out_states, rest))
        written = Checkpoint(self.arguments.out)
        draft = Draft(written.layer_weights(written.layer), self.shape, sparse=True)
        ours = self.frozen.drafts(draft, self.held_out.windows([(0, 0)], LONG), 3)
        last = LENGTH - rest - 1
        parts = [ours[0][0, : last + 1], ours[1][0, last], ours[2][0, last]]
        errors = [
            ((mine - other).norm() / other.norm()).item()
            for mine, other in zip(parts, theirs, strict=True)
        ]
        self.log(f"check: relative error of logits to glm_fused's {max(errors):.3f}")
        assert max(errors) < 0.05, "glm_fused drafts otherwise"

    @torch.no_grad()
    def acceptance(self, weights: Weights, count: int = 4) -> list[float]:
        """The share of drafts s = 1 .. count that are right, of those whose chain was so far.

        Chains begin at every token of the held-out pieces that the model made.
        """
        reached, right = torch.zeros(count), torch.zeros(count)
        for i in range(len(self.held_out.tokens)):
            batch = self.held_out.windows([(i, 0)], LONG)
            draft = Draft(weights, self.shape, sparse=True)
            alive = torch.arange(LONG)[None] >= PROMPT - 1
            best = F.linear(batch.hidden[:, 1:], self.frozen.head).argmax(-1)
            for s, logits in enumerate(self.frozen.drafts(draft, batch, count)):
                alive = alive[:, : LONG - s]
                reached[s] += alive.sum()
                alive = alive & (logits.argmax(-1) == best[:, s:])
                right[s] += alive.sum()
        return (right / reached).tolist()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the checkpoint; a layer it has is trained on")
    add("--out", type=Path, required=True, help="folder of the checkpoint with the layer")
    add("--states", type=Path, required=True, help="folder for the model's states, read if there")
    add("--pieces", type=int, default=272, help="pieces of text to learn from, 513 tokens each")
    add("--held-out", type=int, default=16, help="pieces of text to measure with")
    add("--deadline", default="60", help="HH:MM, or minutes from now")
    add("--threads", type=int, default=1)
    add("--drafts", type=int, default=3, help="drafts of a chain to learn from, 1 to 3")
    add("--batch-tokens", type=int, default=1024)
    add("--matrix-rate", type=float, default=0.01)
    add("--adam-rate", type=float, default=2e-3)
    add("--packed", type=float, default=0.35, help="where that phase begins, of the run")
    add("--sparse", type=float, default=0.65, help="likewise")
    add("--seed", type=int, default=0)
    keep_memory()
    run = Run(parser.parse_args())
    run.train()
    run.write()
    run.check()


if __name__ == "__main__":
    main()
