"""The registry of weight formats agrees with MLX, and weights that do not fit are clear errors."""

import copy
import pickle

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from formats_under_test import AFFINE, FORMATS, GGUFS, OURS

from glm_fused import _ext, ops
from glm_fused.formats.weights import FORMATS as KNOWN
from glm_fused.formats.weights import QUANTIZED, Weight, dense_format, named, quantized_format
from glm_fused.loader import load_model
from glm_fused.models.config import args_from_config
from glm_fused.models.decoder import Model

FLOATS = {mx.float32, mx.float16, mx.bfloat16}
VALUES = mx.zeros((8, 256))


def test_every_format_is_registered_once():
    found = [(fmt.mode, fmt.bits, fmt.group_size) for fmt in QUANTIZED]
    assert sorted(found) == sorted([*AFFINE, *(fmt for fmt in FORMATS[len(AFFINE) :] if fmt[1])])
    packed = {fmt.name for fmt in KNOWN.values() if fmt.mode != "dense"}
    assert packed == {*map(str, QUANTIZED), *(name for name, *_ in [*OURS, *GGUFS])}
    assert len(KNOWN) == len(_ext.formats())
    assert {dense_format(dtype).name for dtype in FLOATS} == {"bf16", "fp16", "fp32"}


def test_names_say_the_group_where_it_is_not_the_usual_one():
    names = {name for name in KNOWN if "affine4" in name}
    assert names == {"affine4-g32", "affine4", "affine4-g128"}
    assert KNOWN["affine4"].parameters == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert str(KNOWN["affine4"]) == repr(KNOWN["affine4"]) == "affine4"


@pytest.mark.parametrize("fmt", QUANTIZED, ids=str)
def test_planes_are_those_that_mlx_packs_to(fmt):
    planes = mx.quantize(VALUES, **fmt.parameters)
    assert len(planes) == len(fmt.planes)
    for plane, array in zip(fmt.planes, planes, strict=True):
        assert array.dtype in plane.dtypes
        assert array.shape == (8, 256 // fmt.group_size * plane.count)
    stored = sum(
        array.nbytes for array in mx.quantize(VALUES.astype(mx.bfloat16), **fmt.parameters)
    )
    assert 8 * stored / VALUES.size == fmt.bits_per_weight


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_defaults_are_those_of_mlx(mode):
    fmt = quantized_format(mode=mode)
    for default, explicit in zip(
        mx.quantize(VALUES, mode=mode), mx.quantize(VALUES, **fmt.parameters), strict=True
    ):
        assert default.shape == explicit.shape


def test_formats_keep_their_identity():
    for fmt in KNOWN.values():
        assert pickle.loads(pickle.dumps(fmt)) is copy.deepcopy(fmt) is copy.copy(fmt) is fmt
        assert named(fmt.name) is fmt
    with pytest.raises(ValueError, match=r"'affine7' is none of bf16, fp16"):
        named("affine7")


def test_impossible_formats_are_named():
    with pytest.raises(ValueError, match=r"mode must be one of affine, mxfp4, .* but is 'int4'"):
        quantized_format(mode="int4")
    with pytest.raises(ValueError, match=r"mxfp4 has no 8 bits in groups of 32, .* mxfp4\."):
        quantized_format(32, 8, "mxfp4")
    with pytest.raises(ValueError, match=r"a dense weight is one of .* but is mlx\.core\.int32"):
        Weight.dense(mx.zeros((4, 4), mx.int32))


PACKED = Weight(mx.quantize(VALUES, 64, 4), KNOWN["affine4"])
CODES, SCALES, BIASES = PACKED.planes
WRONG = {
    r"w\.planes must be a sequence of arrays but is of type int": PACKED._replace(planes=3),
    r"w\.planes\[0\] must be an array but is of type str": PACKED._replace(planes=["a"]),
    r"w\.format must be one of FORMATS but is of type str": PACKED._replace(format="affine4"),
    r"w\.format must be one of .* but is None": PACKED._replace(format=None),
    r"w must have 3 planes in format affine4 but has 2": PACKED._replace(planes=[CODES, SCALES]),
    r"w must have 1 plane in format fp32 but has 0": Weight([], KNOWN["fp32"]),
    r"w\.weight must be uint32 in format affine4 but is float32": PACKED._replace(
        planes=[VALUES, SCALES, BIASES]
    ),
    r"w\.weight must be bfloat16 in format bf16 but is float32": Weight([VALUES], KNOWN["bf16"]),
    r"w\.weight must have shape \(8,64\) but has \(8,32\)": PACKED._replace(
        format=KNOWN["affine8"]
    ),
    r"w\.scales must be float32, float16 or bfloat16 .* but is uint32": PACKED._replace(
        planes=[CODES, SCALES.astype(mx.uint32), BIASES]
    ),
    r"w\.scales must be uint8 in format mxfp4 but is float32": Weight(
        [CODES, mx.zeros((8, 8))], KNOWN["mxfp4"]
    ),
    r"w\.biases must have shape \(8,4\) but has \(8,2\)": PACKED._replace(
        planes=[CODES, SCALES, BIASES[:, :2]]
    ),
    r"w\.biases must be float32 like the other planes but is float16": PACKED._replace(
        planes=[CODES, SCALES, BIASES.astype(mx.float16)]
    ),
}


@pytest.mark.parametrize("message", WRONG, ids=range(len(WRONG)))
def test_weights_that_do_not_fit(message):
    with mx.stream(mx.cpu), pytest.raises(ValueError, match=rf"\[quantized_matvec\] {message}"):
        ops.quantized_matvec(mx.zeros((1, 256)), WRONG[message])


def test_groups_that_columns_do_not_fill():
    with pytest.raises(ValueError, match=r"w: 200 columns are no whole number of groups of 64"):
        ops.quantized_matvec(mx.zeros((1, 200)), PACKED)


def test_a_factor_a_matrix_is_checked():
    fmt, planes = KNOWN["nvfp4-global"], mx.quantize(mx.zeros((3, 8, 256)), mode="nvfp4")
    assert [plane.per_matrix for plane in fmt.planes] == [False, False, True]
    assert fmt.bits_per_weight == KNOWN["nvfp4"].bits_per_weight
    assert quantized_format(mode="nvfp4") is KNOWN["nvfp4"]
    x = mx.zeros((3, 1, 256))
    for factor, message in (
        (mx.ones((3, 8)), r"w\.global_scale must have shape \(3\) but has \(3,8\)"),
        (mx.ones(3, mx.bfloat16), r"w\.global_scale must be float32 in format nvfp4-global"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantized_matvec(x, Weight([*planes, factor], fmt))
    with pytest.raises(ValueError, match=r"must have 3 planes in format nvfp4-global but has 2"):
        ops.quantized_matvec(x, Weight(planes, fmt))
    assert ops.quantized_matvec(x, Weight([*planes, mx.ones(3)], fmt)).shape == (3, 1, 8)


@pytest.mark.parametrize("mode", ["affine", "nvfp4"])
def test_loading_quantizes_nothing(tmp_path, monkeypatch, mode):
    quantization = quantized_format(mode=mode).parameters
    config = tiny_config(tie_word_embeddings=True)
    path = write_checkpoint(tmp_path, config, layout="mlx", quantization=quantization)

    def refuse(*_, **__):
        raise AssertionError("weights are loaded, not made")

    monkeypatch.setattr(mx, "quantize", refuse)
    model, _ = load_model(path)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, config["vocab_size"])


def test_a_packed_source_without_a_format_is_refused():
    model = Model(args_from_config(tiny_config()))
    name = "model.layers.0.self_attn.kv_b_proj"
    planes = mx.quantize(mx.zeros((512, 64)), 64, 4)
    parts = zip(("weight", "scales", "biases"), planes, strict=True)
    with pytest.raises(ValueError, match=r"kv_b_proj is packed, but no format is declared for it"):
        model.sanitize({f"{name}.{leaf}": plane for leaf, plane in parts})
