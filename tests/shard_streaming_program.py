"""A rank of some models: what `steps_of` gives of each, saved in ``FOLDER/MODEL SLOTS.RANK.npz``.

``python shard_streaming_program.py FOLDER SLOTS MODEL...``; SLOTS is how many of a layer's experts
are in memory, for each rank, such as "4,9", or several such texts with a blank between them. With
the environment's FAULT "rows" a rank streams the first rows of experts, whichever are its own.
With MTP "1" models have their MTP layer.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
from shard_program import bits, steps_of

from glm_fused.loader import open_model
from glm_fused.models.ranks import Ranks
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.source import LayerExperts


def plant():
    """Have a rank stream rows that are another's."""
    part = LayerExperts.part

    def first(self, modules, rows):
        return part(self, modules, {name: slice(0, r.stop - r.start) for name, r in rows.items()})

    LayerExperts.part = first


def main(folder, sizes, *paths):
    mx.set_default_device(mx.cpu)
    ranks = Ranks(mx.distributed.init(strict=True, backend="ring"))
    mtp = os.environ.get("MTP") == "1"
    if os.environ.get("FAULT") == "rows":
        plant()
    for path, size in product(map(Path, paths), sizes.split()):
        slots = size.split(",")
        stream = StreamOptions(slots=int(slots[ranks.rank % len(slots)]))
        opened = open_model(path, "auto", stream, 32, mtp=mtp, ranks=ranks)
        opened.read()
        found = bits(steps_of(opened.model))
        np.savez(f"{folder}/{path.name} {size}.{ranks.rank}.npz", **found)
        print(json.dumps(opened.model.streaming.stats()))


if __name__ == "__main__":
    main(*sys.argv[1:])
