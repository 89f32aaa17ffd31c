"""How cached rows are stored: as floats, or packed to eight bits a value.

A packed row is a row of bytes: first its codes, then its float32 scales, then its RoPE values as
bfloat16.

=======  =====  ====================================  ====================
format   dtype  codes                                 scales
=======  =====  ====================================  ====================
fp8      uint8  e4m3, as FlashMLA's 656-byte row      one per 128 values
int8     int8   integers from -127 to 127             one
=======  =====  ====================================  ====================

Every other format is a dtype, in which rows are stored as they are; ``auto`` is the dtype of the
activations.
"""

import mlx.core as mx

TILE = 128  # how many values share an fp8 scale
FLOATS = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}
PACKED = {"fp8": mx.uint8, "int8": mx.int8}
KV_FORMATS = ("auto", *FLOATS, *PACKED)


def check_kv_format(name: str) -> str:
    """``name`` if it is one of `KV_FORMATS`, else ValueError."""
    if name not in KV_FORMATS:
        raise ValueError(f"[kv_format] expected one of {', '.join(KV_FORMATS)}, got {name!r}.")
    return name


def format_of(dtype: mx.Dtype) -> str:
    """The format of rows of ``dtype``; raises ValueError if no format has it."""
    formats = FLOATS | PACKED
    for name, found in formats.items():
        if found == dtype:
            return name
    expected = ", ".join(str(found) for found in formats.values())
    raise ValueError(f"[cache] rows of {dtype} are in no format, expected one of {expected}.")


def row_widths(kv_format: str, rank: int, rope: int) -> tuple[int, int]:
    """The widths of cached keys and values; in a packed format all bytes belong to the keys."""
    if kv_format in FLOATS:
        return rank, rope
    return row_bytes(kv_format, rank, rope), 0


def row_bytes(kv_format: str, rank: int, rope: int) -> int:
    """The bytes of a row of ``rank`` values and ``rope`` RoPE values in a format but ``auto``."""
    if kv_format in FLOATS:
        return (rank + rope) * FLOATS[kv_format].size
    return rank + 4 * _scales(kv_format, rank) + 2 * rope


def pack(values: mx.array, rope: mx.array | None, kv_format: str) -> mx.array:
    """Pack float values [..., rank] and rope [..., w] into rows [..., `row_bytes`] of a format.

    The rows are uint8 for fp8 and int8 for int8; ``rope`` may be None, which is w = 0.
    """
    rank = values.shape[-1]
    count = _scales(kv_format, rank)
    tile = TILE if kv_format == "fp8" else rank
    padding = [(0, 0)] * (values.ndim - 1) + [(0, count * tile - rank)]
    tiles = mx.pad(values.astype(mx.float32), padding)
    tiles = tiles.reshape(*values.shape[:-1], count, tile)
    largest = mx.abs(tiles).max(axis=-1, keepdims=True)
    scales = largest / (448.0 if kv_format == "fp8" else 127.0)
    tiles = tiles / mx.where(scales == 0, 1.0, scales)
    codes = mx.to_fp8(tiles) if kv_format == "fp8" else mx.round(tiles).astype(mx.int8)
    codes = codes.reshape(*values.shape[:-1], count * tile)[..., :rank]
    dtype = PACKED[kv_format]
    parts = [codes, mx.contiguous(scales[..., 0]).view(dtype)]
    if rope is not None:
        parts.append(mx.contiguous(rope.astype(mx.bfloat16)).view(dtype))
    return mx.concatenate(parts, axis=-1)


def unpack(rows: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The float32 values [..., rank] and bfloat16 RoPE values [..., w] of packed rows.

    Raises ValueError if rows of that dtype belong to no format.
    """
    kv_format = format_of(rows.dtype)
    count = _scales(kv_format, rank)
    codes, scales, rope = mx.split(rows, [rank, rank + 4 * count], axis=-1)
    scales = mx.contiguous(scales).view(mx.float32)
    if kv_format == "fp8":
        scales = mx.repeat(scales, TILE, axis=-1)[..., :rank]
        values = mx.from_fp8(codes, mx.float32)
    else:
        values = codes.astype(mx.float32)
    return values * scales, mx.contiguous(rope).view(mx.bfloat16)


def _scales(kv_format: str, rank: int) -> int:
    return -(-rank // TILE) if kv_format == "fp8" else 1
