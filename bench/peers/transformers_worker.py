"""Decodes for bench_decode.py with transformers, greedily, in an environment that has it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1]))
from bursts import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, required=True)
    options = parser.parse_args()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(options.model, dtype=torch.bfloat16).eval()
    tokens = torch.randint(model.config.vocab_size, (1, options.prompt))
    with torch.inference_mode():
        output = model(tokens, use_cache=True)
        cache, first = output.past_key_values, output.logits[:, -1:].argmax(-1)

        def burst(threads: int, count: int) -> dict[str, float]:
            torch.set_num_threads(threads)
            token = first
            for _ in range(count):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            cache.crop(-count)
            return {}

        serve({"transformers": transformers.__version__}, burst)


if __name__ == "__main__":
    main()
