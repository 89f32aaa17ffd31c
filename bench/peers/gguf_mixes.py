"""The bundled model as GGUF with its experts in several types: what each costs in bits per byte.

llama.cpp is set up as in llama_gguf.py. Then, in bench/peers:

    python gguf_mixes.py --build build --limit 24

llama-quantize makes the files: gate and up of the experts in the type that a line names; down,
whose 64 columns no block of 256 divides, in a type of blocks of 32; and the rest in Q6_K, or Q8_0
where its blocks do not divide the columns. The smallest types want an importance matrix: they get
one in which all columns are worth the same.

Per mix: the file's MB, bits a weight of gate and up, bits per byte as bits_per_byte.py has them,
and whether the logits of a prompt and of tokens after it are those of the reference path and of
experts that are streamed, through banks of few and of many slots, and from a Flash-MoE sidecar.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from llama_gguf import EXPERTS, llama_parser

sys.path.append(str(Path(__file__).parents[1] / "demo_model"))

from bits_per_byte import Window, load_model, make_windows, measure
from corpus import held_out_texts

import glm_fused
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.conversion.gguf import to_gguf
from glm_fused.conversion.target import Types
from glm_fused.formats.weights import FORMATS
from glm_fused.models.config import ModelArgs
from glm_fused.models.decoder import Model
from glm_fused.streaming.flashmoe_export import export
from glm_fused.streaming.options import StreamOptions

# The type of gate and up, and that of down.
MIXES = {
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "Q2_K": "Q4_0",
    "IQ3_XXS": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q8_0",
    "Q6_K": "Q8_0",
    "Q8_0": "Q8_0",
}
PROMPT, AFTER = 100, 40  # tokens; index_topk is 64


def write_importance(path: Path, args: ModelArgs) -> None:
    """Write an importance matrix for the experts, of ones."""
    writer, experts = gguf.GGUFWriter(path, "glm-dsa"), args.n_routed_experts
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for layer in args.layers:
        for name in EXPERTS if layer.is_sparse else ():
            down = name == "ffn_down_exps"
            columns = args.moe_intermediate_size if down else args.hidden_size
            tensor = f"blk.{layer.index}.{name}.weight"
            writer.add_tensor(f"{tensor}.in_sum2", np.ones((experts, columns), np.float32))
            writer.add_tensor(f"{tensor}.counts", np.ones((experts, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(model: Model, tokens: list[int]) -> mx.array:
    """The logits of a prompt, and of tokens that come one by one after it."""
    cache = model.make_cache()
    parts = [model(mx.array([tokens[:PROMPT]]), cache)]
    parts += [model(mx.array([[token]]), cache) for token in tokens[PROMPT:]]
    logits = mx.concatenate(parts, axis=1)
    mx.eval(logits)
    return logits


def others(path: Path, tokens: list[int]) -> Iterator[mx.array]:
    """The logits of every other way to run the model."""
    model, _ = glm_fused.load_model(path)
    with glm_fused.reference_path():
        yield run(model, tokens)
    sidecar = export(path, path.with_suffix(".sidecar")).path
    for options in ({"slots": 4}, {"slots": 16}, {"slots": 5, "sidecar": sidecar}):
        model, _ = glm_fused.load_model(path, stream=StreamOptions(**options))
        yield run(model, tokens)


def row(name: str, path: Path, windows: list[Window], nbytes: int) -> str:
    model, _ = glm_fused.load_model(path)
    tokens = windows[0].tokens[: PROMPT + AFTER]
    logits = run(model, tokens)
    same = all(
        mx.array_equal(logits.view(mx.uint16), other.view(mx.uint16)).item()
        for other in others(path, tokens)
    )
    bits = measure(load_model(str(path), "auto"), windows)["nats"] / math.log(2) / nbytes
    size, per_weight = path.stat().st_size / 1e6, FORMATS[name.lower()].bits_per_weight
    kinds = f"{name:<8} {MIXES[name]:<7}"
    return f"{kinds}{size:>6.2f}{per_weight:>12.2f}{bits:>12.4f}  {'yes' if same else 'NO'}"


def main() -> None:
    parser = llama_parser(__doc__)
    add = parser.add_argument
    add("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    add("--limit", type=float, help="KiB of held-out text (default: all of it)")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    texts = [file.text for file in held_out_texts(options.limit and int(options.limit * 1024))]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
    windows = make_windows(tokenizer, texts, 512, 256)
    nbytes = sum(len(text.encode()) for text in texts)
    quantize = next(path for path in options.build.rglob("llama-quantize") if path.is_file())
    print(
        f"gate, up down       MB  bits/weight   bits/byte  the same bits ({nbytes} bytes of text)"
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "bf16.gguf"
        to_gguf("demo", whole, Types())
        importance = Path(folder) / "importance.gguf"
        write_importance(importance, glm_fused.load_model(whole, lazy=True)[0].args)
        for name in options.mixes:
            path = Path(folder) / f"{name}.gguf"
            parts = zip(EXPERTS, (name, name, MIXES[name]), strict=True)
            types = [word for part in parts for word in ("--tensor-type", "=".join(part))]
            command = [str(quantize), "--imatrix", str(importance), *types]
            subprocess.run(
                [*command, str(whole), str(path), "Q6_K"], check=True, capture_output=True
            )
            print(row(name, path, windows, nbytes), flush=True)


if __name__ == "__main__":
    main()
