"""Tiny checkpoints whose layers have unlike numbers of routed experts."""

import re

from conftest import tiny_config

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.(experts\.(\d+)\.|switch_mlp\.|gate\.)")


def pruned(tensors, counts):
    """The first ``counts[i]`` experts of every layer, in either layout."""
    kept = {}
    for name, array in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            kept[name] = array
        elif match[3] is None:
            kept[name] = array[: counts[int(match[1])]]
        elif int(match[3]) < counts[int(match[1])]:
            kept[name] = array
    return kept


def unlike_experts(checkpoint, counts, edit=None, **options):
    """A checkpoint whose config lists ``counts``; ``edit`` changes its tensors once pruned."""

    def prune(tensors):
        tensors = pruned(tensors, counts)
        return (edit(tensors) or tensors) if edit else tensors

    mtp = [] if len(counts) > 5 else [max(counts)]
    config = tiny_config(num_routed_experts_per_layer=[*counts, *mtp])
    return checkpoint(config, edit=prune, **options)
