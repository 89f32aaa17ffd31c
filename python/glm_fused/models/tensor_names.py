"""What a stored tensor's name tells: its layer, and why the model has no use for it."""

import re

from .config import ModelArgs
from .layer_spec import MTP

_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
_MTP = re.compile(r"(?:model\.)?mtp\.([0-9]{1,3})\.(?:block\.)?")
_MTP_NORM = re.compile(r"(?:model\.)?mtp\.[0-9]{1,3}\.norm\.")
_COPY = re.compile(r"model\.layers\.[0-9]+\.(?:embed_tokens|shared_head\.head)\.")
MTP_REASON = "MTP layer"


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor's name has, None where it has none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def release_name(name: str, layers: int) -> str:
    """The name that the release has for a tensor or module of a model with so many ``layers``.

    Some checkpoints keep MTP layers as ``mtp.0`` and so on, with the tensors of a decoder layer in
    ``block``; in the release they follow the decoder's layers.
    """
    match = _MTP.match(name)
    if match is None:
        return name
    rest = name[match.end() :]
    if _MTP_NORM.match(name):
        rest = f"shared_head.{rest}"
    return f"model.layers.{layers + int(match[1])}.{rest}"


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts, of whichever layer and layout."""
    return ".mlp.switch_mlp." in name or ".mlp.experts." in name


def unused(name: str, args: ModelArgs) -> str | None:
    """Why the model does not use a tensor that checkpoints may have; None where it does."""
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary tables"
    if name.startswith("lm_head.") and args.tie_word_embeddings:
        return "tied head"
    layer = layer_of(name)
    if layer is None:
        return None
    if layer >= len(args.model_layers):
        return MTP_REASON
    if args.model_layers[layer].role == MTP and _COPY.match(name):
        return "MTP layer's copies of embedding and head"
    if ".self_attn." in name and name.endswith((".k_scale", ".v_scale")):
        return "scales of a quantized cache"
    if ".self_attn.indexer." in name and not args.model_layers[layer].is_full:
        return "indexer of a shared layer"
    return None
