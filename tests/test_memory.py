"""Loading a checkpoint peaks at no more than its own size plus one shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config, write_checkpoint

SHARDS = 8
# Python objects, threads and the allocator's slack take this; a real checkpoint needs about 1 %.
OVERHEAD = 24 << 20
MEASURE = """
import json, resource, sys
import mlx.core as mx
from mlx.utils import tree_flatten
from glm_fused.loader import load_model

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which a child inherits from the process that started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

mx.eval(mx.ones(4) + 1)
baseline = peak()
model, _ = load_model(sys.argv[1])
size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
print(json.dumps({"size": size, "peak": peak() - baseline, "mlx_peak": mx.get_peak_memory()}))
"""
AFFINE_4 = {"group_size": 64, "bits": 4, "mode": "affine"}


def big_config():
    """A config of about 150 M weights, nearly all of them experts."""
    return tiny_config(
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        n_routed_experts=24,
        vocab_size=2048,
    )


def measure(directory):
    command = [sys.executable, "-c", MEASURE, str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("layout", "quantization"),
    [("mlx", None), ("hf", None), ("hf-fused", None), ("fp8", None), ("mlx", AFFINE_4)],
    ids=["mlx-bf16", "hf-bf16", "hf-fused-bf16", "hf-fp8", "mlx-affine4"],
)
def test_peak_is_the_size_plus_one_shard(tmp_path, layout, quantization):
    write_checkpoint(
        tmp_path, big_config(), layout=layout, quantization=quantization, shards=SHARDS
    )
    shard = max(file.stat().st_size for file in Path(tmp_path).glob("*.safetensors"))
    found = measure(tmp_path)
    # All but the experts of FP8 is loaded as bfloat16, so the bound is on the loaded size.
    print(f"{layout}: " + ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in found.items()))
    assert found["peak"] <= found["size"] + shard + OVERHEAD
    assert found["mlx_peak"] <= found["size"] + shard
