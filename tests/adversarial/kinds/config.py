"""Damaged config.json and generation_config.json are refused, or both paths of the model agree."""

import json
import random
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
from tests.adversarial.harness import Wrong
from tests.adversarial.kinds import _configs, _json, _model

from glm_fused import validation

NAME = "config"
SLOW_CASES = 4000
QUICK_CASES = 100
# A model of these tensors may have other values of these, and is another model that is as good.
FREE = {
    "rms_norm_eps", "routed_scaling_factor", "norm_topk_prob", "max_position_embeddings",
    "rope_parameters", "rope_theta", "rope_scaling", "index_topk", "num_experts_per_tok",
    "indexer_rope_interleave", "n_group", "topk_group", "num_key_value_heads", "eos_token_id",
    "moe_layer_freq", "model_type",
}  # fmt: skip


def prepare(folder):
    """Make a good checkpoint."""
    _model.write(folder / "good")
    _model.expected(folder / "good")


def damage(rng, good):
    """The text of a config, and what must become of it: True where it must be refused."""
    if rng.random() < 0.4:
        changes = rng.choice(_configs.IMPOSSIBLE)(rng, good)
        return json.dumps(good | changes), True, set(changes)
    if rng.random() < 0.15:
        content = _json.damaged_bytes(rng, json.dumps(good).encode())
        return content.decode("latin1"), False, None
    text, paths = _json.damaged(rng, good)
    return text, False, {path[0] for path in paths}


def case(seed, folder):
    """Damage one config, every fifth time that of generation."""
    rng = random.Random(seed)
    good = json.loads((folder / "good" / "config.json").read_text())
    name = "config.json"
    if seed % 5 == 4:
        name, good = "generation_config.json", {"eos_token_id": [250, 251], "temperature": 0.9}
        text, must_fail, keys = *_json.damaged(rng, good)[:1], False, set()
    else:
        text, must_fail, keys = damage(rng, good)
    bad = _model.clone(folder / "good", folder / "bad", name)
    (bad / name).write_text(text, errors="surrogatepass")
    before = mx.get_active_memory()
    try:
        fused, reference = _model.both_paths(bad)
    except (ValueError, OSError):
        if mx.get_active_memory() - before > 1 << 20:
            raise Wrong("data was read before it was refused") from None
        raise
    if must_fail:
        raise Wrong(f"accepted: {text[:300]}")
    if fused != reference:
        raise Wrong(f"the paths differ: {text[:300]}")
    if keys is not None and not keys & FREE and fused != _model.expected(folder / "good"):
        raise Wrong(f"other logits after a change of {keys}: {text[:300]}")
    return "right"


@contextmanager
def planted():
    """Integers are taken as they come."""
    with mock.patch.object(validation, "integer", lambda key, value, low=1, high=0: value):
        yield
