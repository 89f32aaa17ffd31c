"""What was found in a checkpoint: every weight of the model, where it is and in which format."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..formats.weights import FP8_BLOCK, Format
from ..models.tensors import Form, Module

# What methods other than MLX's call the planes of their weights.
OTHER_NAMES = {"scales": ("weight_scale", "weight_scale_inv"), "global_scale": ("weight_scale_2",)}
FP8_AS_BF16 = "fp8"  # on disk; it becomes bfloat16


class Source(NamedTuple):
    """A weight as stored, in either layout: its module, its tensor and its logical shape."""

    path: str
    tensor: str
    module: Module
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    @property
    def kind(self) -> str:
        return self.form.kind or self.module.kind


class Stored(NamedTuple):
    """A weight found: its format (or `FP8_AS_BF16`), and its bytes on disk and loaded.

    ``method`` names what wrote it, where its tensors are not the planes of the format:
    compressed-tensors, modelopt or GGUF (for a packed ``kv_b_proj``).
    """

    source: Source
    format: Format | str
    nbytes: int
    loaded: int
    method: str | None = None


@dataclass
class Inventory:
    """Every weight of the model and where it is; ``ignored`` counts unused tensors by reason.

    ``converts_norms`` tells that norms become floats of the embedding's type, or bfloat16.
    """

    stored: list[Stored] = field(default_factory=list)
    converts_norms: bool = False
    ignored: dict[str, int] = field(default_factory=dict)

    def written_by(self, method: str) -> dict[str, tuple[Format, tuple[int, ...]]]:
        """Format and shape of what ``method`` wrote, by path in the checkpoint."""
        return {
            stored.source.path: (stored.format, stored.source.shape)
            for stored in self.stored
            if stored.method == method and isinstance(stored.format, Format)
        }

    @property
    def formats(self) -> dict[str, Format]:
        """The format of every packed weight, by its module in the checkpoint's and our layout."""
        found: dict[str, Format] = {}
        for source, fmt, _, _, method in self.stored:
            if isinstance(fmt, Format) and fmt.mode != "dense":
                found[source.path] = fmt
                if source.kind != "kv_b_proj" or method is None:  # else embed_q becomes dense
                    found[source.module.path] = fmt
                if source.kind == "kv_b_proj":
                    head = source.path.removesuffix("kv_b_proj")
                    found[f"{head}unembed_out"] = fmt
                elif source.kind == "experts gate, up":
                    found[source.module.path.replace("gate_proj", "up_proj")] = fmt
        return found

    @property
    def loaded_bytes(self) -> dict[str, int]:
        """The bytes that weights have in memory, by module; of some that share a tensor by one."""
        found: dict[str, int] = {}
        for stored in self.stored:
            path = stored.source.module.path
            found[path] = found.get(path, 0) + stored.loaded
        return found

    @property
    def block_rows(self) -> int:
        """How many rows of a weight may share scales on disk that no loaded weight has."""
        return FP8_BLOCK if any(s.format == FP8_AS_BF16 for s in self.stored) else 1

    @property
    def float_format(self) -> str:
        """The activations' format: fp32 if the embedding or a norm is, else bf16."""
        deciding = ("embedding",) if self.converts_norms else ("norms", "embedding")
        kinds = {str(s.format) for s in self.stored if s.source.kind in deciding}
        return "fp32" if "fp32" in kinds else "bf16"
