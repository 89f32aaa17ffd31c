"""A tiny model in a GGUF file whose experts are in blocks, or in a Flash-MoE sidecar beside it."""

import gguf_files
from gguf_files import Q
from tests.adversarial.kinds._streamed import CONFIG, Fixture

from glm_fused.streaming.flashmoe_export import export

TYPES = {"ffn_gate_exps": Q.Q8_0, "ffn_up_exps": Q.Q8_0, "ffn_down_exps": Q.Q5_0, "shexp": Q.Q8_0}


def type_of(name):
    """The type of a tensor; None for the writer's own."""
    return next((kind for part, kind in TYPES.items() if part in name), None)


class GgufFixture(Fixture):
    """Unpacked experts are the file's own."""

    def write(self):
        return gguf_files.write_gguf(self.folder / "model.gguf", CONFIG, types=type_of), None


class FlashMoeFixture(GgufFixture):
    """Unpacked experts are in a Flash-MoE sidecar."""

    def write(self):
        checkpoint, _ = super().write()
        export(checkpoint, self.folder / "flash-moe")
        return checkpoint, self.folder / "flash-moe"
