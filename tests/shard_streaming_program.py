"""A rank of some models: what `steps_of` gives of each, saved in ``FOLDER/MODEL SLOTS.RANK.npz``.

``python shard_streaming_program.py FOLDER SLOTS MODEL...``; SLOTS is how many of a layer's experts
are in memory, for each rank, such as "4,9", or several such texts with a blank between them. A
MODEL may have a sidecar, as in "MODEL+SIDECAR", of whose name each RANK is its number.

With the environment's SHARD "pipeline" ranks have layers, and else rows. With FAULT "rows" a rank
streams the first rows of the last model's experts, whichever are its own, with "layers" experts of
other layers than its own. With MTP "1" models have their MTP layer. FORMATS are those of a
pipeline's caches.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pipeline_program
from shard_program import bits, steps_of

from glm_fused.loader import open_model
from glm_fused.models.line import Line
from glm_fused.models.ranks import Ranks
from glm_fused.streaming import banks
from glm_fused.streaming.options import StreamOptions
from glm_fused.streaming.source import LayerExperts


def plant_rows():
    """Have a rank stream rows that are another's."""
    part = LayerExperts.part

    def first(self, modules, rows):
        return part(self, modules, {name: slice(0, r.stop - r.start) for name, r in rows.items()})

    LayerExperts.part = first


def plant_layers():
    """Have a rank stream experts that are another's."""
    source = banks.checkpoint_source

    def others(checkpoint, args, layers):
        mine = source(checkpoint, args, layers)
        every = source(checkpoint, args, args.layers).layers
        here = [i for i in mine.layers if i in every]
        theirs = [experts for i, experts in every.items() if i not in mine.layers]
        return replace(mine, layers=mine.layers | dict(zip(here, theirs, strict=False)))

    banks.checkpoint_source = others


def main(folder, sizes, *models):
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    in_line, mtp = os.environ.get("SHARD") == "pipeline", os.environ.get("MTP") == "1"
    ranks = Line(group) if in_line else Ranks(group)
    faults = {"rows": plant_rows, "layers": plant_layers}
    for model, size in product(models, sizes.split()):
        if model == models[-1]:
            faults.get(os.environ.get("FAULT"), lambda: None)()
        path, _, sidecar = model.replace("RANK", str(ranks.rank)).partition("+")
        slots = int(size.split(",")[ranks.rank % (size.count(",") + 1)])
        stream = StreamOptions(slots=slots, sidecar=sidecar or None)
        opened = open_model(path, "auto", stream, 32, mtp=mtp, ranks=ranks)
        opened.read()
        if in_line:
            found = pipeline_program.steps_of(opened.model, os.environ["FORMATS"].split())
        else:
            found = bits(steps_of(opened.model))
        np.savez(f"{folder}/{Path(path).name} {size}.{ranks.rank}.npz", **found)
        print(json.dumps(opened.model.streaming.stats()))


if __name__ == "__main__":
    main(*sys.argv[1:])
