"""Converts the bundled model to GGUF, for llama.cpp to decode it in bench_decode.py.

llama.cpp's sources come with those of llama-cpp-python (0.3.36 was used), in vendor/llama.cpp:

    pip download llama-cpp-python==0.3.36 --no-deps --no-build-isolation \\
        --no-binary llama-cpp-python
    tar xzf llama_cpp_python-0.3.36.tar.gz
    mv llama_cpp_python-0.3.36/vendor/llama.cpp .
    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-bench llama-quantize

The converter there needs an environment with torch, transformers and sentencepiece:

    python bench/peers/llama_gguf.py --source llama.cpp --build build \\
        --python OTHER_VENV/bin/python model.gguf

The weights, as bfloat16 in the release's layout, go through that converter, then through
llama-quantize: Q6_K with experts in Q4_0, which is nearest to the affine 6 and 4 bits that are
bundled. Where Q6_K's blocks of 256 do not divide the columns, llama-quantize takes Q8_0. The
file has no vocabulary, because the converter knows the tokenizers of released models alone;
llama-bench needs none, as its tokens are random numbers.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
from release import write_release

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
CONVERT = """\
import sys
source = sys.argv.pop(1)
sys.path[:0] = [source, f"{source}/gguf-py"]
import convert_hf_to_gguf
from conversion.glm import GlmMoeDsaModel
GlmMoeDsaModel.set_vocab = GlmMoeDsaModel._set_vocab_none
convert_hf_to_gguf.main()
"""


def convert(source: Path, python: str, folder: Path, outtype: str, gguf: Path) -> None:
    """Run the converter of llama.cpp's ``source`` on a released checkpoint's folder."""
    command = [python, "-c", CONVERT, str(source), str(folder)]
    subprocess.run([*command, "--outtype", outtype, "--outfile", str(gguf)], check=True)


def llama_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of where llama.cpp and its converter are."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add = parser.add_argument
    add("--source", type=Path, required=True, metavar="FOLDER", help="llama.cpp's sources")
    add("--build", type=Path, required=True, metavar="FOLDER", help="in which it was built")
    add("--python", required=True, help="that runs the converter")
    return parser


def main() -> None:
    parser = llama_parser(__doc__)
    parser.add_argument("gguf", type=Path, metavar="FILE", help="to write")
    options = parser.parse_args()
    quantize = next(
        (path for path in options.build.rglob("llama-quantize") if path.is_file()), None
    )
    if quantize is None or shutil.which(options.python) is None:
        parser.error("--build has to hold llama-quantize, and --python to be a program.")
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), Path(name) / "bf16.gguf"
        write_release(folder)
        convert(options.source, options.python, folder, "bf16", whole)
        types = [part for name in EXPERTS for part in ("--tensor-type", f"{name}=q4_0")]
        subprocess.run([str(quantize), *types, str(whole), str(options.gguf), "Q6_K"], check=True)
    print(f"{options.gguf}: {options.gguf.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
