"""Measures how good the model is on text that it has not seen."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import held_out_files, held_out_texts
from forward import Forward, forward
from parallel import Workers
from text import encode_files
from torch import Tensor
from transformers import AutoTokenizer, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

Log = Callable[[str], None]


class HeldOut:
    """A fixed sample of held-out windows, and the mean number of bytes per token in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> None:
        files = encode_files(tokenizer, [file.text for file in held_out_files()])
        windows = [
            ids[start : start + length + 1]
            for ids in files
            for start in range(0, len(ids) - length, length)
        ]
        random.Random(0).shuffle(windows)
        windows = windows[:count]
        size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in windows)
        self.windows = torch.tensor(windows)
        self.bytes_per_token = size / (len(windows) * length)

    def loss(self, model: GlmMoeDsaForCausalLM, sparse: bool, workers: Workers) -> float:
        """The mean loss in nats per token."""

        def work(worker: int) -> float:
            total = 0.0
            with torch.no_grad():
                for batch in self.windows[worker :: workers.count].split(4):
                    logits = forward(model, batch[:, :-1], Forward(sparse=sparse))
                    total += F.cross_entropy(
                        logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                    ).item()
            return total

        return sum(workers.map(work)) / self.windows[:, 1:].numel()

    def describe(self, loss: float) -> str:
        """A loss in both units."""
        bits = loss / math.log(2) / self.bytes_per_token
        return f"{loss:.4f} nats/token = {bits:.4f} bits/byte"


def set_index_topk(model: GlmMoeDsaForCausalLM, topk: int) -> None:
    """Set how many keys the indexers of ``transformers``' own forward pass select."""
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.index_topk = topk


@torch.no_grad()
def check(model: GlmMoeDsaForCausalLM, tokens: Tensor, log: Log) -> None:
    """Compare the restated forward pass with that of ``transformers``, dense and sparse."""
    was, topk = model.training, model.config.index_topk
    model.eval()
    for sparse in (False, True):
        set_index_topk(model, topk if sparse else 1 << 20)
        ours = forward(model, tokens, Forward(sparse=sparse))
        theirs = model(tokens, use_cache=False).logits
        worst = (ours - theirs).abs().max().item()
        log(f"check sparse={sparse}: largest logit difference to transformers {worst:.2e}")
    set_index_topk(model, topk)
    model.train(was)


def sample(folder: Path, log: Log, prompts: int = 4, new_tokens: int = 160) -> None:
    """Print continuations of held-out functions by the saved checkpoint, run by transformers."""
    model = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [file for file in held_out_texts() if len(file.text) > 4000][:prompts]
    for number, file in enumerate(texts):
        at = file.text.find("\n    def ", len(file.text) // 3)
        at = at if at >= 0 else len(file.text) // 3
        prompt = file.text[max(0, at - 500) : at + 80]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        torch.manual_seed(number)
        options = {"do_sample": True, "temperature": 0.4, "top_k": 20} if number % 2 else {}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
        )
        log(f"--- sample {number} from {file.path} ({'sampled' if options else 'greedy'})")
        log(f"{prompt}⟦{tokenizer.decode(out[0, ids.shape[1] :])}⟧")
