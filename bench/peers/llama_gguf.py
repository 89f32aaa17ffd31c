"""Converts the bundled model to GGUF, for llama.cpp to decode it in bench_decode.py.

llama.cpp's sources come with those of llama-cpp-python (0.3.36 was used), in vendor/llama.cpp:

    pip download llama-cpp-python==0.3.36 --no-deps --no-build-isolation \\
        --no-binary llama-cpp-python
    tar xzf llama_cpp_python-0.3.36.tar.gz
    mv llama_cpp_python-0.3.36/vendor/llama.cpp .
    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-bench llama-quantize

Then:

    python bench/peers/llama_gguf.py --build build model.gguf

`glm-fused convert` writes the weights as bfloat16, and llama-quantize makes them Q6_K with experts
in Q4_0, which is nearest to the affine 6 and 4 bits that are bundled. Where Q6_K's blocks of 256 do
not divide the columns, llama-quantize takes Q8_0.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx

from glm_fused.conversion.gguf import to_gguf
from glm_fused.conversion.target import Types

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def llama_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of where llama.cpp is."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    help = "in which llama.cpp was built"
    parser.add_argument("--build", type=Path, required=True, metavar="FOLDER", help=help)
    return parser


def main() -> None:
    parser = llama_parser(__doc__)
    parser.add_argument("gguf", type=Path, metavar="FILE", help="to write")
    options = parser.parse_args()
    quantize = next(
        (path for path in options.build.rglob("llama-quantize") if path.is_file()), None
    )
    if quantize is None:
        parser.error("--build has to hold llama-quantize.")
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "bf16.gguf"
        to_gguf("demo", whole, Types())
        types = [part for name in EXPERTS for part in ("--tensor-type", f"{name}=q4_0")]
        subprocess.run([str(quantize), *types, str(whole), str(options.gguf), "Q6_K"], check=True)
    print(f"{options.gguf}: {options.gguf.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
