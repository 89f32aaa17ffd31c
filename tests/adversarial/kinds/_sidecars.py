"""A tiny model with a sound sidecar, and folders that look like it but for one fault."""

import hashlib
import shutil

from tests.adversarial.harness import Wrong, clear_error
from tests.adversarial.kinds._streamed import Fixture, check

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.streaming.banks import attach_banks, plan_streaming
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.pack import pack
from glm_fused.streaming.sidecar import Sidecar
from glm_fused.streaming.sidecar_identity import check_described, sidecar_source, verify

STEPS = 2
LAYERS = ("layer_001.bin", "layer_002.bin")
FILES = (*LAYERS, "manifest.json")


class Sidecars(Fixture):
    """``folder``/case is a sidecar that `lay_out` makes anew for every case."""

    def __init__(self, folder):
        super().__init__(folder, prompts=4, steps=STEPS)
        self.sound, self.path = self.folder / "sidecar", folder / "case"
        self.opened = Checkpoint.open(self.folder)
        self.bytes = {name: (self.sound / name).read_bytes() for name in FILES}

    def lay_out(self, **changed):
        """Write the sound sidecar, with other bytes in some files; None leaves a file out."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        for name in FILES:
            content = changed.get(name, self.bytes[name])
            if name in changed and content is not None:
                (self.path / name).write_bytes(content)
            elif content is not None:
                (self.path / name).symlink_to(self.sound / name)

    def outcome(self, rng, noticed=True):
        """The outcome of using the sidecar; with `noticed`, verify has to say something."""
        by_verify = self._verify()
        if noticed and by_verify is None:
            raise Wrong("verify finds nothing")
        try:
            source = sidecar_source(self.path, self.opened, self._args)
            self._use(source, rng)
        except Wrong:
            raise
        except Exception as error:
            if clear_error(error) is None:
                raise
            if by_verify is None:
                raise Wrong(f"verify finds nothing, but loading says {error}") from None
            return f"error: {error}"
        return "right"

    def _verify(self):
        """What verify says; None if all is well."""
        try:
            sidecar = Sidecar.open(self.path)
            check_described(sidecar, self.opened, self._sources[False])
            problems = [p for _, p in verify(sidecar, self._sources[False]) if p]
        except Exception as error:
            message = clear_error(error)
            if message is None:
                raise
            return message
        return problems[0] if problems else None

    def _use(self, source, rng):
        slots = rng.choice([2, 4, 8])
        options = StreamOptions(budget=8 << 30, patience=5.0, slots=slots)
        plan = plan_streaming(self._manifest, self._args, source, options, "auto")
        self.shared.streaming = None
        formats = self._manifest.formats
        streaming = attach_banks(self.shared, self._args, source, plan, options, formats)
        self.shared.streaming = streaming
        check(self.shared, rng.choice(self.prompts), STEPS)

    def mend(self):
        """Pack again, which has to end with the sound files or say in an error why it does not."""
        try:
            pack(self.folder, self.path)
        except Exception as error:
            if clear_error(error) is None:
                raise
            return
        for name in FILES:
            if digest(self.path / name) != hashlib.sha256(self.bytes[name]).digest():
                raise Wrong(f"packing again leaves {name} damaged")


def digest(file):
    return hashlib.sha256(file.read_bytes()).digest()
