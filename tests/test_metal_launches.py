"""How many kernels a GPU launches for one decoded token: this package's own and MLX's."""

import functools
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import tiny_config
from metal_backend import metal, simulated_only
from mlx.utils import tree_map_with_path

from glm_fused.models.cache import Span
from glm_fused.models.config import ModelArgs, args_from_config
from glm_fused.models.decoder import Model
from glm_fused.ops import metal_sim

pytestmark = simulated_only

# GLM-5.2's schedule: 78 layers, of which three are dense and 21 have an indexer.
SCHEDULE = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
SIZES = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=64,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, index_head_dim=32,
)  # fmt: skip
# For one token and for 16 at once. A change may lower these numbers, and not raise them.
MOST = {"dense, full": 12, "sparse, full": 14, "sparse, shared": 11}
MOST_OF_A_TOKEN = 918
CACHED = 40  # tokens, more than an indexer keeps


def kind(layer):
    return ("sparse" if layer.is_sparse else "dense") + (", full" if layer.is_full else ", shared")


@functools.cache
def model():
    """One with a layer of each kind, 4-bit as `mlx_lm.convert -q` makes it."""
    config = tiny_config(
        **SIZES, num_hidden_layers=4, indexer_types=["full", "full", "full", "shared"],
        mlp_layer_types=["dense", "dense", "sparse", "sparse"], num_nextn_predict_layers=0,
    )  # fmt: skip
    made = Model(args_from_config(config))
    cast = made.cast_predicate

    def as_checkpoints_are(path, a):
        return a.astype(mx.bfloat16) if cast(path) else a.astype(mx.float32)

    made.update(tree_map_with_path(as_checkpoints_are, made.parameters()))

    def quantized(path, module):
        # On a CPU, MLX unpacks an embedding's row in many steps.
        packable = hasattr(module, "to_quantized") and not path.endswith("embed_tokens")
        return packable and made.quant_predicate(path, module)

    nn.quantize(made, 32, 4, class_predicate=quantized)
    mx.eval(made.parameters())
    return made


def launches(make):
    """The kernels that a GPU launches to evaluate the arrays that `make` gives."""
    with metal(compiler=lambda *_: None):  # they are counted and do not run
        stock = metal_sim.stock_launches(*make())
    own = [launch.kernel.removeprefix("glm_fused_") for launch in metal_sim.take_launches()]
    return Counter(name.split("_bfloat16")[0] for name in own) + Counter(stock)


@functools.cache
def of_a_layer(tokens, kv_format="auto"):
    """The launches of each kind of layer, and of what is before and after the layers."""
    net, counts = model().model, {}
    model().kv_format = kv_format
    cache = model().make_cache()
    model().kv_format = "auto"
    mx.eval(model()(mx.zeros((1, CACHED), mx.int32), cache))
    span = Span.of(cache, tokens)
    angles = net._rope.angles(span.positions())
    x = mx.zeros((1, tokens, SIZES["hidden_size"]), mx.bfloat16)
    selection = mx.zeros((1, tokens, model().args.index_topk), mx.int32)
    mx.eval(x, selection, *angles, [entry.state for entry in cache])
    for spec, layer, entry in zip(model().args.layers, net.layers, cache, strict=True):

        def step(layer=layer, entry=entry, given=None if spec.is_full else selection):
            out, _ = layer(x, span, angles, entry, given)
            return [out, *[one.keys for one in entry], entry[0].values]

        counts[kind(spec)] = launches(step)
    ids = mx.array([[1] * tokens])
    counts["rest"] = launches(lambda: [net.embed_tokens(ids)]) + launches(
        lambda: [model().lm_head(net.norm(x))]
    )
    return counts


@pytest.mark.parametrize("kv_format", ["auto", "fp8", "int8"])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("name", MOST)
def test_launches_of_a_layer(name, tokens, kv_format):
    """With a packed cache as many as without: rows are packed where they are appended."""
    counts = of_a_layer(tokens, kv_format)[name]
    assert sum(counts.values()) == MOST[name], counts


def test_launches_of_a_token():
    """Of GLM-5.2's 78 layers."""
    counts = of_a_layer(1)
    layers = Counter(kind(layer) for layer in ModelArgs.from_dict(SCHEDULE).layers)
    assert layers == {"dense, full": 3, "sparse, full": 18, "sparse, shared": 57}
    sums = {name: sum(found.values()) for name, found in counts.items()}
    total = sum(sums[name] * count for name, count in layers.items()) + sums["rest"]
    assert total == MOST_OF_A_TOKEN, sums


def test_views_are_no_launches_and_copies_are():
    x = mx.contiguous(mx.random.normal((3, 4, 8)))
    mx.eval(x)
    for count, make in (
        (0, lambda: x.swapaxes(0, 1)),
        (0, lambda: x.reshape(12, 8)[::2, 1:]),
        (0, lambda: mx.split(x, 2, axis=-1)[1]),
        (0, lambda: mx.depends(x, x.swapaxes(0, 1))),
        (1, lambda: x.swapaxes(0, 1).reshape(12, 8)),
        (1, lambda: mx.contiguous(x.swapaxes(0, 1))),
        (1, lambda: x.astype(mx.bfloat16)),
        (1, lambda: mx.zeros((3,))),
        (2, lambda: mx.concatenate([x, x], axis=-1)),
        (3, lambda: (x + 1) * (x + 1)),
    ):
        found = launches(lambda: [make()])  # noqa: B023
        assert sum(found.values()) == count, found
