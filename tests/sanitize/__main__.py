"""Build the extension with sanitizers in a folder of its own and run tests with it.

    python -m tests.sanitize address              # ASan + UBSan: ops, weights, slots, steps
    python -m tests.sanitize thread               # TSan: slots, pool, two threads on one model
    python -m tests.sanitize address --compiler clang++-19

Before the tests it plants a bug of each kind, which has to be found. The exit code is 0 if all was
clean.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PLANT = "import ctypes, sys; from glm_fused import _ext; print(_ext.__file__); "
PLANT += "ctypes.CDLL(_ext.__file__).glm_fused_plant(sys.argv[1].encode())"
# The finder of an editable install would find the plain extension.
SITE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


@dataclass(frozen=True)
class Kind:
    """Sanitizers that go together, and what is run under them."""

    preset: str  # its name in CMakePresets.json
    flags: str
    runtime: str
    planted: dict[str, str]  # bugs, and what their reports say
    options: dict[str, str]
    tests: list[str]
    planted_inside: dict[str, str] = field(default_factory=dict)  # bugs for the extension alone


# These leave out programs of their own, which are preloaded or built otherwise, and limits of
# memory, which the sanitizers' shadow exceeds.
OTHERWISE = "not sanitizer and not preload and not interrupted and not threads_that_there_are"
OTHERWISE += " and not loads_for_ever and not task_throws and not daemon and not ctrl_c"
OTHERWISE += " and not bounded_tile and not within_the_budget and not arrive_last_first"
OTHERWISE += " and not metal_equals and not a_pair and not on_metal"
KINDS = {
    "address": Kind(
        "asan",
        "address,undefined",
        "asan",
        {"overflow": "heap-buffer-overflow", "shift": "shift exponent 40 is too large"},
        # Leaks would be Python's own, as it frees nothing at exit.
        {
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        ["test_ops.py", "test_weights.py", "test_topk.py", "test_slots.py", "test_crashes.py",
         "test_indexer_topk.py", "test_sparse_mla_decode.py", "test_streaming.py",
         "test_task_errors.py", "test_append_rows.py", "test_decode_step.py",
         "test_decode_step_changes.py", "test_decode_step_ends.py", "test_flashmoe.py",
         "test_gguf_models.py::test_mixes_of_types_and_joined_tensors"],
        {"scratch": "use-after-poison"},
    ),
    "thread": Kind(
        "tsan",
        "thread",
        "tsan",
        {"race": "data race"},
        # With less history it forgets the stack that a suppression names.
        {"TSAN_OPTIONS": f"suppressions={HERE / 'thread.supp'}"
         ":halt_on_error=1:exitcode=66:history_size=7"},
        ["test_slots.py", "sanitize/test_two_threads.py",
         "test_decode_step_ends.py::test_threads_that_come_and_go"],
    ),
}  # fmt: skip


def runtime(compiler: str, name: str) -> Path:
    """The sanitizer's library, which has to be loaded before Python, as it replaces malloc."""
    for file in (f"lib{name}.so", f"libclang_rt.{name}-x86_64.so", f"libclang_rt.{name}.so"):
        command = [compiler, f"-print-file-name={file}"]
        path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if path.is_absolute() and path.exists():
            return path.resolve()
    raise SystemExit(f"{compiler} has no {name} runtime.")


def build(kind: Kind, compiler: str, folder: Path) -> Path:
    """Build a folder for PYTHONPATH with the package and the instrumented extension."""
    configure = ["cmake", "--preset", kind.preset, "-B", folder]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", folder, "--parallel"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    package = site / "glm_fused"
    package.mkdir(parents=True)
    for file in (ROOT / "python" / "glm_fused").iterdir():
        if file.suffix != ".so" and file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    (extension,) = folder.glob("_ext*.so")
    (package / extension.name).symlink_to(extension)
    (site / "sitecustomize.py").write_text(SITE)
    return site


def environment(kind: Kind, compiler: str, site: Path) -> dict[str, str]:
    """The environment of an instrumented Python; MLX's library lies where its package does."""
    code = "import mlx.core; print(mlx.core.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mlx = Path(found.stdout.strip()).parent
    # The sanitizer looks for the C++ runtime when it starts, before the extension is there.
    preload = f"{runtime(compiler, kind.runtime)}:{runtime('g++', 'stdc++')}"
    return os.environ | kind.options | {
        "LD_PRELOAD": preload,
        "LD_LIBRARY_PATH": f"{mlx}/lib",
        "PYTHONPATH": str(site),
        "PYTHONMALLOC": "malloc",
        "GLM_FUSED_NUM_THREADS": "4",
    }  # fmt: skip


def finds_planted_bugs(kind: Kind, variables: dict[str, str], site: Path) -> bool:
    """Whether a report comes for each bug, and none where there is no bug."""
    found = True
    for bug, report in {"none": "", **kind.planted, **kind.planted_inside}.items():
        command = [sys.executable, "-c", PLANT, bug]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        caught = done.returncode != 0 and report in done.stderr if report else not done.returncode
        assert str(site) in done.stdout, done.stdout + done.stderr
        print(f"planted {bug}: {'as expected' if caught else done.stderr[-2000:] or 'missed'}")
        found = found and caught
    return found


def programs_are_clean(kind: Kind, compiler: str, folder: Path) -> bool:
    """Whether the pool and the bank, without Python, run clean, and the pool's bugs are found."""
    folder.mkdir(parents=True, exist_ok=True)
    cpp, csrc = ROOT / "tests" / "cpp", ROOT / "csrc"
    slots = ("learned_policy", "policy", "table", "files", "reader", "bank")
    bank = [csrc / "slots" / f"{name}.cpp" for name in slots]
    pool = [csrc / "cpu" / "runtime" / f"{name}.cpp" for name in ("pool", "thread_pool")]
    sources = {"pool_stress": pool, "slots_stress": bank}
    flags = ["-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={kind.flags}", "-I", csrc]
    for name, files in sources.items():
        command = [compiler, *flags, "-fno-sanitize-recover=all", cpp / f"{name}.cpp", *files]
        subprocess.run([*command, "-o", folder / name], check=True)
    data = folder / "experts.bin"
    data.write_bytes(b"".join(bytes([e]) * 4196 for e in range(32)))
    stress = [str(data), "32", "16", "3", "s3fifo", "1"]
    runs = [("pool_stress", [], ""), ("slots_stress", stress, "")]
    runs += [("pool_stress", [bug], report) for bug, report in kind.planted.items()]
    clean = True
    for name, arguments, report in runs:
        done = subprocess.run(
            [folder / name, *arguments],
            env=os.environ | kind.options,
            capture_output=True,
            text=True,
        )
        good = done.returncode != 0 and report in done.stderr if report else not done.returncode
        what = f"{name} {arguments[0] if report else ''}".strip()
        print(f"{what}: {'as expected' if good else done.stderr[-2000:] or 'missed'}", flush=True)
        clean = clean and good
    return clean


def spent(start: float) -> str:
    """The seconds since ``start``, and those of processors in all that was run so far."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = children.ru_utime + children.ru_stime
    return f"{time.perf_counter() - start:.0f} s ({used:.0f} s of processor time)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--compiler", default="g++")
    text = "the pool and the bank alone, without Python"
    parser.add_argument("--programs", action="store_true", help=text)
    args, pytest_arguments = parser.parse_known_args()
    kind = KINDS[args.kind]
    folder = ROOT / "build" / f"sanitize-{args.kind}-{Path(args.compiler).name}"
    start = time.perf_counter()
    if not programs_are_clean(kind, args.compiler, folder / "programs"):
        return 1
    print(f"programs: {spent(start)}", flush=True)
    if args.programs:
        return 0
    site = build(kind, args.compiler, folder)
    variables = environment(kind, args.compiler, site)
    print(f"built in {spent(start)}", flush=True)
    if not finds_planted_bugs(kind, variables, site):
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    tests = [str(ROOT / "tests" / name) for name in kind.tests]
    code = subprocess.run(
        [*command, "-k", OTHERWISE, *(pytest_arguments or tests)], env=variables, cwd=ROOT
    ).returncode
    print(f"{args.kind}, {args.compiler}: exit code {code}, {spent(start)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
