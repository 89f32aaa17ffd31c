"""Write demo_tokens.json: transformers (fp32) on the bundled model, far beyond index_topk.

    python make_demo_tokens.py          needs torch and transformers, as make_vectors.py does

The prompt defines values, and asks for the first after 20 times index_topk tokens. The file has the
prompt, the most likely token after each of its tokens, and the greedy continuation.
"""

import json
import random
from pathlib import Path
from unittest.mock import patch

import oracle
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, DynamicCache
from weights import Tensors

DEMO = Path(__file__).parents[2] / "python" / "glm_fused" / "demo_model"
TARGET = Path(__file__).parent / "demo_tokens.json"
MTP_LAYER = "model.layers.7."  # which is no layer of the decoder
SEED, TOPKS, CONTINUED = 1, 20, 48
MIN_MARGIN = 1e-4  # the least gap between the two best logits, which is far above fp32 noise


def read_demo() -> Tensors:
    """The bundled checkpoint's tensors, dequantized, under transformers' names."""
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.startswith(MTP_LAYER)]  # noqa: SIM118
        stored = {name: file.get_tensor(name) for name in names}
    tensors: Tensors = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{module}.scales" in stored:
            scales, biases = (stored[f"{module}.{k}"].float() for k in ("scales", "biases"))
            tensors[name] = dequantize(tensor, scales, biases)
        elif leaf not in ("scales", "biases"):
            tensors[name] = tensor.float()
    for name in list(tensors):
        if name.endswith("embed_q.weight"):
            prefix = name.removesuffix("embed_q.weight")
            keys = tensors.pop(name).swapaxes(1, 2)
            values = tensors.pop(f"{prefix}unembed_out.weight")
            tensors[f"{prefix}kv_b_proj.weight"] = torch.cat([keys, values], 1).flatten(0, 1)
        elif ".switch_mlp." in name:
            for expert, tensor in enumerate(tensors.pop(name)):
                tensors[name.replace("switch_mlp", f"experts.{expert}")] = tensor
    return tensors


def dequantize(packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Undo MLX's affine packing of little-endian codes in 32-bit words, in groups of 64."""
    bits = 32 * packed.shape[-1] // (64 * scales.shape[-1])
    words = packed.view(torch.uint8).to(torch.int32)
    stream = (words[..., None] >> torch.arange(8)) & 1
    codes = stream.flatten(-2).unflatten(-1, (-1, bits))
    values = (codes << torch.arange(bits)).sum(-1).unflatten(-1, (-1, 64)).float()
    return (values * scales[..., None] + biases[..., None]).flatten(-2)


def make_prompt(seed: int, tokenizer: AutoTokenizer, length: int) -> list[int]:
    """Definitions, filler up to `length` tokens, and a question for the first definition."""
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(30)]
    values = {name: rng.randrange(10, 99) for name in names}
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    while len(tokenizer.encode(text, add_special_tokens=False)) < length:
        name = rng.choice(names)
        text += rng.choice([
            f"def get_{name}(self):\n    return self.{name}\n\n",
            f"assert {name} == {values[name]}\n",
            f"if {name} is None:\n    raise ValueError('{name}')\n",
        ])  # fmt: skip
    question = tokenizer.encode(f"\nassert {names[0]} ==", add_special_tokens=False)
    return tokenizer.encode(text, add_special_tokens=False)[:length] + question


def lowest_index_topk(
    scores: torch.Tensor, k: int, dim: int = -1, sorted: bool = True
) -> torch.return_types.topk:
    """torch.topk, but the lowest index wins among equal scores, of which ReLU makes many."""
    values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def continue_greedily(model: oracle.Model, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The prompt's logits [length, vocab] and the greedy continuation."""
    cache, made = DynamicCache(config=model.config), []
    lowest = patch.object(torch.Tensor, "topk", lowest_index_topk)
    with torch.no_grad(), lowest, patch.object(torch, "topk", lowest_index_topk):
        first = model(torch.tensor([tokens]), past_key_values=cache).logits[0]
        logits = first[-1]
        for _ in range(CONTINUED):
            best = logits.topk(2)
            assert best.values[0] - best.values[1] >= MIN_MARGIN
            made.append(int(best.indices[0]))
            logits = model(torch.tensor([made[-1:]]), past_key_values=cache).logits[0, -1]
    return first, made


def main() -> None:
    model = oracle.build(DEMO, read_demo())
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokens = make_prompt(SEED, tokenizer, TOPKS * model.config.index_topk)
    logits, continued = continue_greedily(model, tokens)
    best = logits.topk(2)
    margin = (best.values[:, 0] - best.values[:, 1]).min().item()
    print(f"narrowest margin {margin:.1e}; continuation: {tokenizer.decode(continued)!r}")
    assert margin >= MIN_MARGIN
    document = {"prompt": tokens, "predicted": best.indices[:, 0].tolist(), "continued": continued}
    TARGET.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
