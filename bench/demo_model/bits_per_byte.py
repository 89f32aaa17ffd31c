"""Bits per byte of the demo model on held-out standard-library source.

    python bits_per_byte.py --original demo_hf                  # transformers, HF checkpoint
    python bits_per_byte.py --model demo_mlx --limit 64         # glm_fused, MLX checkpoint
    python bits_per_byte.py --original demo_hf --model demo_mlx --json
    python bits_per_byte.py --model demo_mlx --kv-formats auto fp8 int8

The model is teacher-forced over windows of ``--window`` tokens that advance by ``--stride``; every
token of every file is predicted exactly once, by the first window that reaches it, through the real
sparse attention. Bits per byte = total nats / ln 2 / total UTF-8 bytes. Both checkpoints see the
same windows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from corpus import held_out_texts


@dataclass(frozen=True)
class Window:
    """Token ids, the last of which is only predicted, and how many last predictions count."""

    tokens: list[int]
    counted: int


def make_windows(tokenizer, texts: list[str], window: int, stride: int) -> list[Window]:
    """Cut every text, opened by the end-of-text token, into overlapping windows."""
    windows: list[Window] = []
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        end = 1  # ids[:end] are predicted (the opening token needs no prediction)
        while end < len(ids):
            last = min(len(ids), end + (window if end == 1 else stride))
            start = max(0, last - window - 1)
            windows.append(Window(ids[start:last], last - end))
            end = last
    return windows


def nats(logits: np.ndarray, targets: np.ndarray) -> float:
    """The summed cross-entropy of ``logits [n, vocab]`` against ``targets [n]``, in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return float((total - np.take_along_axis(logits, targets[:, None], -1)[:, 0]).sum())


def load_original(path: str) -> Callable[[list[int]], np.ndarray]:
    """A function from tokens to logits [n, vocab]: the HF checkpoint in transformers, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    return logits


def load_model(path: str, kv_format: str) -> Callable[[list[int]], np.ndarray]:
    """A function from tokens to logits [n, vocab]: the MLX-layout checkpoint in glm_fused."""
    import mlx.core as mx

    import glm_fused
    from glm_fused.host import to_numpy

    model, _ = glm_fused.load_model(path, kv_format=kv_format)

    def logits(tokens: list[int]) -> np.ndarray:
        return to_numpy(model(mx.array(tokens)[None])[0].astype(mx.float32))

    return logits


def measure(logits: Callable[[list[int]], np.ndarray], windows: list[Window]) -> dict[str, float]:
    """The total nats, the accuracy of the most likely token, and the seconds over all windows."""
    total, right, count = 0.0, 0, 0
    start = time.perf_counter()
    for window in windows:
        scores = logits(window.tokens[:-1])[-window.counted :]
        targets = np.array(window.tokens[-window.counted :])
        total += nats(scores, targets)
        right += int((scores.argmax(-1) == targets).sum())
        count += window.counted
    return {
        "tokens": count,
        "nats": total,
        "accuracy": right / count,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Parse the command line, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", help="HF checkpoint, evaluated with transformers")
    parser.add_argument("--model", help="MLX-layout checkpoint, evaluated with glm_fused")
    parser.add_argument("--kv-formats", nargs="+", default=["auto"], help="of --model's cache")
    parser.add_argument("--limit", type=float, help="KiB of held-out text (default: all of it)")
    parser.add_argument("--window", type=int, default=512, help="tokens seen at once")
    parser.add_argument("--stride", type=int, default=256, help="tokens between windows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if not (arguments.original or arguments.model):
        parser.error("name a checkpoint with --original, --model or both")

    from transformers import AutoTokenizer

    limit = int(arguments.limit * 1024) if arguments.limit else None
    texts = [file.text for file in held_out_texts(limit)]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(arguments.original or arguments.model)
    windows = make_windows(tokenizer, texts, arguments.window, arguments.stride)

    runs = {}
    if arguments.original:
        runs["original"] = load_original(arguments.original)
    for kv_format in arguments.kv_formats if arguments.model else ():
        name = "model" if kv_format == "auto" else f"kv {kv_format}"
        runs[name] = load_model(arguments.model, kv_format)
    results = {}
    for name, logits in runs.items():
        result = measure(logits, windows)
        bits = result["nats"] / math.log(2)
        results[name] = {
            "path": arguments.original if name == "original" else arguments.model,
            "bits_per_byte": bits / size,
            "nats_per_token": result["nats"] / result["tokens"],
            **result,
        }
    if arguments.json:
        report = {"bytes": size, "files": len(texts), "windows": len(windows), "results": results}
        print(json.dumps(report, indent=2))
        return
    print(f"{len(texts)} files, {size} bytes, {len(windows)} windows of {arguments.window} tokens")
    print(
        f"{'':10} {'bits/byte':>9} {'nats/token':>10} {'accuracy':>8} {'tokens':>8} {'seconds':>8}"
    )
    for name, r in results.items():
        print(
            f"{name:10} {r['bits_per_byte']:9.4f} {r['nats_per_token']:10.4f} "
            f"{r['accuracy']:8.4f} {r['tokens']:8d} {r['seconds']:8.1f}"
        )


if __name__ == "__main__":
    main()
