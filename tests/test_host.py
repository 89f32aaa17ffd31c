"""Arrays reach NumPy by one way alone, because NumPy swallows what their evaluation raises."""

import ast
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_slots import BYTES, EXPERTS, make_bank, resolve

from glm_fused.host import to_numpy

ROOT = Path(__file__).parents[1]
FOLDERS = ("python/glm_fused", "bench", "tests/vectors")
HOME = "python/glm_fused/host.py"
# All functions of NumPy that take a buffer, `__array__`, `__dlpack__` or a sequence for an array.
CONVERTERS = {
    "array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray", "asarray_chkfinite",
    "copy", "copyto", "from_dlpack", "frombuffer", "fromiter", "require", "matrix", "asmatrix",
    "memmap", "put", "place", "putmask",
}  # fmt: skip
PROTOCOLS = {"__array__", "__array_interface__", "__dlpack__", "__array_namespace__", "__buffer__"}
# These calls, as (file, call), do not take an array of MLX's; the reason is with them.
ALLOWED = {
    ("bench/demo_model/bits_per_byte.py", "np.array(window.tokens[-window.counted:])"): "a list",
    ("bench/bench_streaming.py", "memoryview(buffer)"): "a map of memory",
    (
        "python/glm_fused/checkpoint/gguf_header.py",
        "np.frombuffer(cursor.take(what, count * dtype.itemsize), dtype)",
    ): "bytes of a file",
    (
        "python/glm_fused/generation/prompt_cache/snapshots.py",
        "np.ascontiguousarray(part)",
    ): "an array of NumPy's own",
    (
        "python/glm_fused/serve/grammar.py",
        "np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)",
    ): "bytes of llguidance",
}


def is_literal(node):
    """Whether a node is a number or a display of numbers, which is no array."""
    if isinstance(node, ast.List | ast.Tuple):
        return all(map(is_literal, node.elts))
    return isinstance(node, ast.Constant) or (
        isinstance(node, ast.UnaryOp) and is_literal(node.operand)
    )


class Finder(ast.NodeVisitor):
    """The conversions in a module that imports MLX."""

    def __init__(self):
        self.modules, self.functions, self.found, self.mlx = {"numpy"}, set(), [], False

    def is_numpy(self, node):
        return isinstance(node, ast.Name) and node.id in self.modules

    def visit_Import(self, node):
        for name in node.names:
            self.mlx |= name.name.split(".")[0] in ("mlx", "mlx_lm", "glm_fused")
            if name.name.split(".")[0] == "numpy":
                self.modules.add(name.asname or "numpy")

    def visit_ImportFrom(self, node):
        module = (node.module or "").split(".")[0]
        self.mlx |= module in ("mlx", "mlx_lm", "glm_fused") or node.level > 0
        if module == "numpy":
            for name in node.names:
                if name.name in CONVERTERS:
                    self.functions.add(name.asname or name.name)

    def visit_Attribute(self, node):
        converts = self.is_numpy(node.value) and node.attr in CONVERTERS
        if converts or node.attr in PROTOCOLS:
            self.found.append(node)
        self.generic_visit(node)

    def visit_Name(self, node):
        if node.id in self.functions or node.id == "memoryview":
            self.found.append(node)

    def visit_Call(self, node):
        name = node.func
        if isinstance(name, ast.Name) and name.id == "getattr" and self.is_numpy(node.args[0]):
            self.found.append(node)
        if isinstance(name, ast.Attribute) and name.attr == "ndarray":  # uncalled, it is a type
            self.found.append(name)
        if not (node.args and all(map(is_literal, node.args))):
            self.visit(name)
        for child in [*node.args, *(k.value for k in node.keywords)]:
            self.visit(child)


def conversions(source):
    """The line and source text of each conversion of what may be an mx.array."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    finder = Finder()
    # An import may come after its use, or within a function.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            finder.visit(node)
    finder.visit(tree)
    if not finder.mlx:
        return []
    found = []
    for node in finder.found:
        call = parents[node]
        whole = call if isinstance(call, ast.Call) and call.func is node else node
        found.append((node.lineno, ast.unparse(whole)))
    return found


def test_nothing_else_makes_an_array_of_numpy():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    if not files:
        pytest.skip("no source tree")
    found, allowed = [], set()
    for file in files:
        name = str(file.relative_to(ROOT))
        for line, call in conversions(file.read_text("utf-8")):
            if (name, call) in ALLOWED:
                allowed.add((name, call))
            elif name != HOME:
                found.append(f"{name}:{line}: {call}: take glm_fused.host.to_numpy")
    assert not found
    assert allowed == set(ALLOWED)  # no exception outlives its reason
    assert len(conversions((ROOT / HOME).read_text("utf-8"))) == 1


@pytest.mark.parametrize(
    "planted",
    [
        "np.array(experts)",
        "np.array(experts, copy=False)",
        "np.array([experts])",
        "np.array([e for e in experts])",
        "np.array(object=experts)",
        "np.asarray(experts, dtype=np.int64)",
        "np.ascontiguousarray(experts)",
        "np.frombuffer(experts, np.int32)",
        "np.from_dlpack(experts)",
        "np.copyto(y, experts)",
        "np.ndarray((3,), np.int32, experts)",
        "list(map(np.array, experts))",
        "make = np.array; make(experts)",
        "getattr(np, 'array')(experts)",
        "memoryview(experts)",
        "experts.__array__()",
        "from numpy import asarray as a; a(experts)",
        "import numpy; numpy.array(experts)",
        "import numpy as other; other.array(experts)",
    ],
)
def test_a_planted_conversion_is_found(planted):
    assert conversions(f"import mlx.core as mx\nimport numpy as np\n{planted}\n")
    assert conversions(f"import numpy as np\ndef f():\n    from . import ops\n    {planted}\n")


def test_what_is_no_array_of_mlx_is_not_found():
    assert not conversions("import mlx.core as mx\nimport numpy as np\nnp.array([[1, -2]], 'f4')")
    assert not conversions("import numpy as np\nnp.array(values)")
    assert not conversions("import mlx.core as mx\nimport numpy as np\nnp.sort(to_numpy(x))")


def test_what_evaluation_raises_is_raised(tmp_path):
    """NumPy alone would answer with memory that was never written."""
    file = tmp_path / "experts.bin"
    file.write_bytes(bytes(EXPERTS * sum(BYTES)))
    bank = make_bank(file, 3)
    with file.open("r+b") as f:
        f.truncate(100)
    swallowed = np.array(resolve(bank, [9, 10])[1])
    assert swallowed.shape == (1, 2)
    with pytest.raises(RuntimeError, match="layer 7, expert"):
        to_numpy(resolve(bank, [9, 10])[1])


def test_values_and_what_is_refused():
    x = mx.array([[1, 2], [3, 4]], mx.int32)
    assert to_numpy(x[:, 1] + 1).tolist() == [3, 5]
    copy = to_numpy(x)
    copy[:] = 0
    assert x.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="bfloat16"):
        to_numpy(x.astype(mx.bfloat16))
    with pytest.raises(ValueError, match=r"must be an mx\.array but is list"):
        to_numpy([1, 2])
