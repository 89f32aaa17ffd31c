"""Compiled kernels of glm_fused; call them through glm_fused.ops."""

from collections.abc import Callable, Sequence
import enum
from typing import Any

import mlx.core

built_with_mlx: str = "0.32.4"

metal_max_tokens: int = 16

built_with_nanobind: str = "3.1.0"

class Plane:
    """One of the arrays that make a weight."""

    @property
    def name(self) -> str:
        """The last part of its tensor's name."""

    @property
    def dtypes(self) -> list[mlx.core.Dtype]:
        """The types that it may have; all planes of floats have the same."""

    @property
    def count(self) -> int:
        """Elements a block of columns."""

    @property
    def per_matrix(self) -> bool:
        """Whether it is one element a matrix, which multiplies its products."""

    @property
    def rows(self) -> int:
        """Rows of the weight that share a row of the plane."""

class Format:
    """How the rows of a weight are stored; one of `formats()`."""

    @property
    def name(self) -> str:
        """The format's name in every output."""

    @property
    def mode(self) -> str:
        """MLX's quantization mode, ``dense``, or empty where MLX has none."""

    @property
    def bits(self) -> int:
        """Bits of a value; 0 for ``dense``."""

    @property
    def group_size(self) -> int:
        """Columns a block, which share a scale; 1 for ``dense``."""

    @property
    def is_default(self) -> bool:
        """Whether it is MLX's for its mode, where only that is given."""

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The arrays that make a weight."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of a value with its share of the scales, floats taken as 16 bits."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of ``mx.quantize`` and ``to_quantized``."""

    def __str__(self) -> str: ...
    def __repr__(self) -> str: ...

def formats() -> tuple[Format, ...]:
    """Every format that the kernels take."""

class Kernel(enum.Enum):
    """Which code runs an op: see ops.routes."""

    cpu = 0
    """This package's CPU kernels."""

    metal = 1
    """This package's Metal kernels."""

    metal_prompt = 2
    """This package's Metal kernels for prompts, on matrix units."""

    loops = 3
    """Plain loops, the reference."""

    mlx = 4
    """Stock MLX ops."""

def probe(a: mlx.core.array) -> mlx.core.array:
    """Return `a`: fails where this build and the installed mlx disagree."""

def check_tokens(tokens: mlx.core.array, vocabulary: int) -> mlx.core.array:
    """
    `tokens` [b, l]; raises where one is outside the vocabulary, now or when they are evaluated.
    """

def embed(
    tokens: mlx.core.array, table: tuple[Sequence[mlx.core.array], Format], hidden: int
) -> mlx.core.array: ...
def gguf_values(w: tuple[Sequence[mlx.core.array], Format]) -> mlx.core.array:
    """The values float32 [..., n, k] of a weight in one of GGUF's formats."""

def quantized_matvec(
    x: mlx.core.array,
    w: tuple[Sequence[mlx.core.array], Format],
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def moe_decode(
    x: mlx.core.array,
    gate: tuple[Sequence[mlx.core.array], Format],
    up: tuple[Sequence[mlx.core.array], Format],
    down: tuple[Sequence[mlx.core.array], Format],
    slots: mlx.core.array,
    scores: mlx.core.array,
    use: SlotUse | None,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def expert_matvec(
    x: mlx.core.array,
    w: tuple[Sequence[mlx.core.array], Format],
    slots: mlx.core.array,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def swiglu(
    gate: mlx.core.array,
    up: mlx.core.array,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def expert_sum(
    y: mlx.core.array,
    scores: mlx.core.array,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def rms_norm(
    x: mlx.core.array,
    weight: mlx.core.array,
    eps: float,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def layer_norm(
    x: mlx.core.array,
    weight: mlx.core.array,
    bias: mlx.core.array,
    eps: float,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def rotate(
    x: mlx.core.array,
    cosines: mlx.core.array,
    sines: mlx.core.array,
    interleaved: bool,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def router_topk(
    x: mlx.core.array,
    weight: mlx.core.array,
    correction_bias: mlx.core.array,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> tuple[mlx.core.array, mlx.core.array]: ...
def cache_buffer(batch: int, capacity: int, width: int, dtype: mlx.core.Dtype) -> mlx.core.array:
    """
    Zeros [batch, 1, capacity, width] for a cache that the default device, a CPU, is
    to read, in huge pages where the system lets.
    """

def append_rows(
    buffer: mlx.core.array,
    rows: mlx.core.array,
    at: int,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def append_pair(
    buffer: mlx.core.array,
    rows: mlx.core.array,
    other_buffer: mlx.core.array,
    other_rows: mlx.core.array,
    at: int,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> tuple[mlx.core.array, mlx.core.array]: ...
def append_packed(
    buffer: mlx.core.array,
    values: mlx.core.array,
    ropes: mlx.core.array | None,
    at: int,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def indexer_topk(
    q: mlx.core.array,
    keys: mlx.core.array,
    weights: mlx.core.array,
    k: int,
    scale: float,
    weight_scale: float,
    start: mlx.core.array | None,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def sparse_mla_decode(
    q: mlx.core.array,
    latents: mlx.core.array,
    ropes: mlx.core.array | None,
    selected: mlx.core.array | None,
    rank: int,
    scale: float,
    start: mlx.core.array | None,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def attention_project(
    x: mlx.core.array,
    cos: mlx.core.array,
    sin: mlx.core.array,
    input_norm: tuple[mlx.core.array, float],
    q_a: tuple[Sequence[mlx.core.array], Format],
    q_a_norm: tuple[mlx.core.array, float],
    q_b: tuple[Sequence[mlx.core.array], Format],
    kv_a: tuple[Sequence[mlx.core.array], Format],
    kv_a_norm: tuple[mlx.core.array, float],
    embed_q: tuple[Sequence[mlx.core.array], Format],
    nope_dim: int,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> list[mlx.core.array]: ...
def full_attention_project(
    x: mlx.core.array,
    cos: mlx.core.array,
    sin: mlx.core.array,
    input_norm: tuple[mlx.core.array, float],
    q_a: tuple[Sequence[mlx.core.array], Format],
    q_a_norm: tuple[mlx.core.array, float],
    q_b: tuple[Sequence[mlx.core.array], Format],
    kv_a: tuple[Sequence[mlx.core.array], Format],
    kv_a_norm: tuple[mlx.core.array, float],
    embed_q: tuple[Sequence[mlx.core.array], Format],
    nope_dim: int,
    wk: tuple[Sequence[mlx.core.array], Format],
    k_norm: tuple[mlx.core.array, float],
    k_norm_bias: mlx.core.array,
    wq_b: tuple[Sequence[mlx.core.array], Format],
    weights_proj: tuple[Sequence[mlx.core.array], Format],
    heads: int,
    interleaved: bool,
    score: bool,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> list[mlx.core.array]: ...
def attention_output(
    x: mlx.core.array,
    attended: mlx.core.array,
    unembed_out: tuple[Sequence[mlx.core.array], Format],
    o_proj: tuple[Sequence[mlx.core.array], Format],
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def metal_attend(
    x: mlx.core.array,
    q: mlx.core.array,
    latents: mlx.core.array,
    ropes: mlx.core.array | None,
    selected: mlx.core.array | None,
    unembed_out: tuple[Sequence[mlx.core.array], Format],
    o_proj: tuple[Sequence[mlx.core.array], Format],
    rank: int,
    scale: float,
    start: mlx.core.array | None,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def mlp_block(
    x: mlx.core.array,
    input_norm: tuple[mlx.core.array, float],
    weights: tuple[
        tuple[Sequence[mlx.core.array], Format],
        tuple[Sequence[mlx.core.array], Format],
        tuple[Sequence[mlx.core.array], Format],
    ],
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def moe_block(
    x: mlx.core.array,
    input_norm: tuple[mlx.core.array, float],
    router_weight: mlx.core.array,
    correction_bias: mlx.core.array,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    experts: tuple[
        tuple[Sequence[mlx.core.array], Format],
        tuple[Sequence[mlx.core.array], Format],
        tuple[Sequence[mlx.core.array], Format],
    ],
    shared: tuple[
        tuple[Sequence[mlx.core.array], Format],
        tuple[Sequence[mlx.core.array], Format],
        tuple[Sequence[mlx.core.array], Format],
    ]
    | None,
    use: SlotUse | None,
    kernel: Kernel,
    stream: mlx.core.Stream
    | mlx.core.ThreadLocalStream
    | mlx.core.Device
    | mlx.core.DeviceType
    | None,
) -> mlx.core.array: ...
def same_items(containers: list[object], items: list[list[object]]) -> bool:
    """
    Whether containers[i], a dict or a list, has just items[i], in order.

    Of a dict that is keys and values in turn.
    """

class ArrayValues:
    """What arrays are, whatever their objects become."""

    def __init__(self, arrays: Sequence[mlx.core.array]) -> None: ...
    def are_of(self, arrays: list[mlx.core.array]) -> bool:
        """Whether the same objects, in their order, still are these."""

class LateCheck:
    """A check of tokens that MLX computes already."""

class DecodeStep:
    """A recorded decode step: see models.decode_step."""

    def __init__(
        self,
        inputs: Sequence[mlx.core.array],
        caches: Sequence[mlx.core.array],
        outputs: Sequence[mlx.core.array],
        appended: Sequence[mlx.core.array],
    ) -> None:
        """
        Take how `outputs`, logits first, and `appended` were made of the others.
        """

    @staticmethod
    def takes(arrays: Sequence[mlx.core.array]) -> bool:
        """Whether no transformation of a function traces the arrays."""

    @staticmethod
    def run_seconds() -> float:
        """How long all steps of this process have run their kernels."""

def tokens_of_step(
    tokens: mlx.core.array, vocabulary: int
) -> tuple[mlx.core.array, LateCheck | None]:
    """
    Tokens that a step takes, int32 or uint32, and what it has to check.

    Those that are not being computed are checked as `check_tokens` does.
    """

class Decoding:
    """A recorded step and its cache: see models.decode_step."""

    def __init__(
        self,
        step: DecodeStep,
        cache: object,
        tokens: mlx.core.array,
        vocabulary: int | None,
        angles: tuple[mlx.core.array, mlx.core.array],
        first: int,
        start: mlx.core.array | None,
        given: Sequence[mlx.core.array],
        rows: tuple[int, int],
        path: object,
        variable: str,
    ) -> None:
        """
        Take what was checked, and is not to change.

        Tokens [b, l] of which without `vocabulary` the embedded rows are given, too;
        cosines and sines of the positions from `first` on; what else the step takes; the
        least and most rows that the caches may have after a step; the context variable
        that, if set, goes before the environment variable.
        """

    def __call__(
        self,
        tokens: object | None,
        cache: object | None,
        given: Sequence[mlx.core.array],
        embedded: mlx.core.array | None = None,
    ) -> list[mlx.core.array] | None:
        """
        The logits of tokens, which the caches then hold, and what else the step gives.

        None, with nothing done, where anything is not as it was.
        """

def take_metal_launches() -> int:
    """How many launches of our kernels were encoded since the last call."""

def metal_kernels() -> list[dict[str, object]]:
    """The Metal kernels that have been compiled, with what compiling took."""

def compile_kernels(outputs: Sequence[mlx.core.array], progress: Callable[[int, int], None]) -> int:
    """
    Compile the Metal kernels that evaluating ``outputs`` would launch.

    Nothing is evaluated. Returns how many were not there already; ``progress``
    is called with how many are done, from 0 on, and of how many.
    """

def moe_decode_obstacle(tokens: int, top_k: int) -> str:
    """Why moe_decode has no Metal kernel for these counts; empty if it has."""

def router_topk_obstacle(experts: int) -> str:
    """Why router_topk has no Metal kernel for this count; empty if it has."""

def mla_prompt_takes(rank: int, rope: int) -> bool:
    """Whether a prompt's attention on Metal takes rows so wide."""

def index_prompt_takes(dim: int) -> bool:
    """Whether a prompt's indexer on Metal takes keys of so many dimensions."""

def index_scratch_bytes(queries: int, keys: int, top_k: int) -> int:
    """
    The scratch memory with which indexer_topk takes so many queries of a sequence on Metal.
    """

def sparse_mla_decode_obstacle(listed: int) -> str:
    """
    Why sparse_mla_decode has no Metal kernel for lists of this length; empty if it has.
    """

def num_threads() -> int:
    """
    Threads of the CPU kernels; ValueError if GLM_FUSED_NUM_THREADS is bad.
    """

def set_num_threads(n: int) -> None:
    """Set the threads of the CPU kernels, 1 to 1024; ValueError for others."""

class Deadline:
    """Ends the process unless it is lifted in time."""

    def __init__(self, seconds: float, last_words: str, code: int) -> None:
        """
        The process writes its last words to stderr and exits with a code, whoever holds
        Python's lock.
        """

    def lift(self) -> None:
        """It has come in time."""

def stream_read(a: mlx.core.array) -> int:
    """
    Read the array's bytes once on all threads: the yardstick of benchmarks.
    """

def huge_page_setting() -> str:
    """
    What the system's owner chose for huge pages: always, madvise or never; empty
    where the system has none.
    """

def move_to_huge_pages(a: mlx.core.array) -> int:
    """
    Move the array's bytes to huge pages where the system lets; returns how many.
    """

def load_with_header(path: str, header: str) -> dict[str, mlx.core.array]:
    """
    The arrays that ``header``, the text of a safetensors header, describes in a
    file of another format, from whose beginning its offsets count. Each is read when
    it is first evaluated. RuntimeError if the file cannot be opened.
    """

def multiply_adds(rounds: int) -> float:
    """Multiply-adds in registers on all threads; returns how many."""

def cpu_kernels() -> str:
    """The instruction set of the CPU kernels: avx512, avx2 or portable."""

def peak_scratch_bytes() -> int:
    """
    The most bytes that CPU kernels have held besides arrays, since the start or the last reset.
    """

def reset_peak_scratch() -> None:
    """Have ``peak_scratch_bytes`` begin anew, with what is held now."""

def active_tasks() -> int:
    """
    Tasks that MLX counts as running; what an error cuts short it counts for good.
    """

class SlotFiles:
    """Open files that experts are read from."""

    def __init__(self, paths: Sequence[str], sizes: Sequence[int], direct: bool) -> None: ...

class SlotReader:
    """A pool of positional reads."""

    def __init__(self, depth: int, split: int) -> None: ...

class SlotBank:
    """Resident experts of one layer."""

    @property
    def arrays(self) -> list[mlx.core.array]:
        """[slots, ...] for each part of an expert."""

    @property
    def capacity(self) -> int:
        """The most experts that a request may name."""

    def resident(self) -> list[int]:
        """The experts in slots now."""

    def stats(self) -> dict[str, int]:
        """Counts since the bank was made."""

    def take_requests(self) -> list[dict[str, object]]:
        """The requests since the last call; the first call starts recording."""

def slot_bank(
    reader: SlotReader,
    files: SlotFiles,
    layer: int,
    parts: Sequence[tuple[Sequence[int], mlx.core.Dtype]],
    locations: Sequence[tuple[int, int]],
    checksums: Sequence[int],
    slots: int,
    spares: int,
    policy: str,
    pinned: Sequence[int],
    patience: float,
) -> SlotBank: ...
def slots_prefetch(bank: SlotBank, experts: mlx.core.array, x: mlx.core.array) -> mlx.core.array:
    """`x`; starts to read experts into spare slots."""

class SlotReads:
    """Whether all experts could be read for what a cache holds."""

    def __init__(self) -> None: ...
    @property
    def error(self) -> str:
        """Of the first read that failed, or empty."""

    def __deepcopy__(self, memo: object) -> SlotReads:
        """Of a copy of the cache: what failed for this one failed for it."""

class SlotUse:
    """One use of a bank in the graph that is being built."""

    def __init__(self, bank: SlotBank, reads: SlotReads) -> None: ...
    def resolve(self, experts: mlx.core.array) -> tuple[mlx.core.array, mlx.core.array]:
        """
        Slots of experts int32 [tokens, top_k], whose reads may go on, and an array to come after.
        """

    def wait(self, slots: mlx.core.array) -> mlx.core.array:
        """The same slots, read."""

    def release(self, y: mlx.core.array, slots: mlx.core.array) -> mlx.core.array:
        """`y`, computed with `slots`, which are leased until then."""

def slots_verify(reads: SlotReads, y: mlx.core.array) -> mlx.core.array:
    """`y`; evaluation raises if a read failed, and `y` is NaN then."""

def checksum(parts: Sequence[bytes]) -> int:
    """The checksum of an expert's tensors, as a bank compares it."""

def slots_simulate(
    policy: str, experts: int, slots: int, pinned: Sequence[int], requests: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """(hits, misses) of one layer's requests."""

def slots_simulate_optimum(
    experts: int, slots: int, requests: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """(hits, misses) of Belady's optimum."""
