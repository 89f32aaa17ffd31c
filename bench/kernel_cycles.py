"""Counts the cycles that a Zen core takes at the least for the kernels of one token's products.

    python bench/kernel_cycles.py build/cp311-cp311-linux_x86_64

From the objects of a build it prints, as the table CYCLES of bench_moe_decode.py, the cycles that
16 weights take at the least on Zen 4 and on Zen 5, by instruction set and format. What a row takes
besides its inner loop is not in it. A core has four vector pipes, and some instructions take only
some of them:

- Zen 4's pipes are of 256 bits, so that an instruction of 512 counts twice; multiply-adds, shifts
  and permutes of all kinds take three of them.
- Zen 5's are of 512; two take multiply-adds, two conversions, additions and shifts, and two the
  permutes that look bytes or words up (unpacking and `vshufps` take any).

Besides, a cycle begins six instructions on Zen 4 and eight on Zen 5, and three and four loads and
stores; copies count as instructions alone. A processor chooses pipes without looking ahead, so that
kernels take 1.1 to 1.3 times as long on Zen 5 even where their weights lie in a cache. It needs
objdump.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

VALUES = {  # the columns of a lane, and the decode that has them
    "affine2": (16, "Affine<2, false>"),
    "affine3": (16, "Affine<3, true>"),
    "affine4": (16, "Affine<4, true>"),
    "affine5": (16, "Affine<5, true>"),
    "affine6": (8, "Affine<6, true>"),
    "affine8": (8, "Affine<8, true>"),
    "mxfp4": (16, "Fp4<true, (anonymous namespace)::E8M0>"),
    "mxfp8": (8, "Fp8<true>"),
    "nvfp4": (16, "Fp4<true, (anonymous namespace)::E4M3>"),
}
BFLOAT16 = "(glm_fused::FloatType)2"
# GGUF's formats are families, numbered in this order from 4 on.
GGUF = Path(__file__).parents[1] / "csrc/formats/gguf_formats.h"
GGUF_VALUES, LOOKED_UP_ROWS = 16, 4
MULTIPLY = re.compile(r"vf?n?m(add|ul|sub)\w*p[sd]$")
SHIFT = re.compile(r"vp(s[rl][la]|ro)")
LOOK_UP = re.compile(r"vpshufb|vp?perm|vpack|vpmov[sz]x|vinsert|vextract|vp?align")
REARRANGE = re.compile(r"vp?unpck|vp?shuf")
CONVERT_OR_ADD = re.compile(r"vcvt|v(add|sub)p[sd]")
COPY = re.compile(r"vmov|vp?broadcast|vzero|vlddqu")


Instruction = tuple[int, str, str]


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each function's name, and its instructions: address, mnemonic and operands."""
    for text in re.split(r"\n(?=[0-9a-f]{16} <)", listing):
        name, *lines = text.split("\n")
        found = (re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line) for line in lines)
        yield name, [(int(m[1], 16), m[2], m[3]) for m in found if m]


def inner_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The loop with the largest share of multiplications."""
    places = {at: i for i, (at, _, _) in enumerate(instructions)}
    loops = []
    for end, (_, mnemonic, operands) in enumerate(instructions):
        target = re.match(r"[0-9a-f]+\b", operands)
        if mnemonic.startswith("j") and target:
            begin = places.get(int(target[0], 16), end + 1)
            if begin <= end:
                loops.append(instructions[begin : end + 1])

    def share(loop: list[Instruction]) -> float:
        return sum(bool(MULTIPLY.match(i[1])) for i in loop) / len(loop)

    return max(loops, key=share)


def cycles(loop: list[Instruction], weights: int) -> tuple[float, float]:
    """Those of 16 weights at the least, on Zen 4 and on Zen 5."""
    shared = three = all_five = multiply = late = look_up = memory = 0
    for _, mnemonic, operands in loop:
        memory += "(" in operands and mnemonic != "lea"
        if not mnemonic.startswith("v") or COPY.match(mnemonic):
            continue
        width = 2 if "%zmm" in operands else 1
        multiplies, shifts = MULTIPLY.match(mnemonic), SHIFT.match(mnemonic)
        looks_up = LOOK_UP.match(mnemonic)
        shared += width
        three += width * bool(multiplies or shifts or looks_up or REARRANGE.match(mnemonic))
        all_five += 1
        multiply += bool(multiplies)
        late += bool(shifts or CONVERT_OR_ADD.match(mnemonic))
        look_up += bool(looks_up)
    sixteens = weights / 16
    zen4 = max(shared / 4, three / 3, len(loop) / 6, memory / 3)
    zen5 = max(all_five / 4, max(multiply, late, look_up) / 2, len(loop) / 8, memory / 4)
    return zen4 / sixteens, zen5 / sixteens


def patterns() -> Iterator[tuple[str, int, str]]:
    """Formats, the columns of a lane, and what a kernel's name has in it, with its rows."""
    anonymous = r"\(anonymous namespace\)::"

    def one_vector(decode: str, reading: int) -> str:
        return (
            rf"Tile<{anonymous}{decode} >::one_vector<(\d), {anonymous}"
            rf"InPlace<{reading}, {re.escape(BFLOAT16)}>, {anonymous}Constant<1> >\("
        )

    for fmt, (values, decode) in VALUES.items():
        reading = 16 if fmt == "nvfp4" else 4 if fmt == "mxfp8" else 8
        yield fmt, values, one_vector(re.escape(decode), reading)
    names = re.findall(r'each\([\s\\]*\w+, \w+, "([\w-]+)"', GGUF.read_text())
    for number, fmt in enumerate(names, 4):
        family = rf"\(glm_fused::Family\){number}>"
        yield fmt, GGUF_VALUES, one_vector(rf"GgufBlocks<{family}", 0)
        yield fmt, GGUF_VALUES, rf"LookedUpRows<{family}::rows\(\)()"


def count(objects: Path, name: str) -> dict[str, tuple[float, float]]:
    """The cycles of every format that has vector kernels with one instruction set."""
    kinds = ("dot", "gguf") if name == "avx512" else ("dot",)
    paths = [next(objects.rglob(f"{kind}_kernels_{name}.cpp.o")) for kind in kinds]
    command = ["objdump", "-dC", "--no-show-raw-insn", *paths]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for function, instructions in functions(listing):
        for fmt, values, pattern in patterns():
            if m := re.search(pattern, function):
                rows = int(m[1] or LOOKED_UP_ROWS)
                fewest = cycles(inner_loop(instructions), 2 * rows * 16 * values)
                # A grid's words are looked up where there are rows enough.
                if m[1] == "" or fmt not in found:
                    found[fmt] = fewest
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("objects", type=Path, help="a folder of a build")
    options = parser.parse_args()
    for name in ("avx512", "avx2"):
        print(f'    "{name}": {{')
        for fmt, found in sorted(count(options.objects, name).items()):
            print(f'        "{fmt}": ({found[0]:.2f}, {found[1]:.2f}),')
        print("    },")


if __name__ == "__main__":
    main()
