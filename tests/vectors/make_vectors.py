"""Write the golden test vectors of this folder.

    python make_vectors.py                 every case, from the seeds in cases.py
    python make_vectors.py glm51 fp8       some cases
    python make_vectors.py --search 500    look for token seeds with wide margins, write nothing

README.md says what they are.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import torch
import transformers
from cases import CASES, N_TEXT_TOKENS, Case
from safetensors.torch import save_file
from weights import Tensors, dequantize, full_layers, make_weights, quantize_fp8

HERE = Path(__file__).parent
MIN_MARGIN = 5e-5  # ten times the rms fp32 noise of the index scores (README.md)
MAX_DECODE_ERROR = 1e-4


def make_tokens(case: Case, seed: int) -> list[torch.Tensor]:
    """The case's prompt, then the prompts of its batch, each int32 [1, L]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (case.length, *case.batch_lengths)
    return [
        torch.randint(N_TEXT_TOKENS, (1, n), generator=generator, dtype=torch.int32)
        for n in lengths
    ]


def write_config(case: Case) -> Path:
    folder = HERE / case.name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    return folder


def checkpoint(case: Case) -> tuple[Tensors, Tensors]:
    """The tensors as stored, and as the fp32 oracle computes with them."""
    stored = make_weights(case)
    if case.fp8:
        stored = quantize_fp8(stored)
    return stored, dequantize(stored) if case.fp8 else stored


def search(case: Case, tries: int) -> None:
    """Print the token seeds whose narrowest boundary is widest."""
    folder, tensors = write_config(case), checkpoint(case)[1]
    model = oracle.build(folder, tensors)
    best = 0.0
    for seed in range(tries):
        margin = float("inf")
        for run in runs_of(case, model, tensors, make_tokens(case, seed)):
            margin = min(margin, run.margin)
            if margin <= best:
                break
        else:
            best = margin
            print(f"{case.name}: token_seed={seed} margin {margin:.2e}", flush=True)


def runs_of(
    case: Case, model: oracle.Model, tensors: Tensors, prompts: list[torch.Tensor]
) -> Iterator[oracle.Choices]:
    """What the oracle makes of each prompt and, for a case with an MTP layer, that of the first."""
    run = oracle.prefill(model, prompts[0])
    yield run
    yield from (oracle.prefill(model, tokens) for tokens in prompts[1:])
    if case.mtp:
        mtp = oracle.build_mtp(model, tensors).to(run.logits.dtype)
        yield oracle.drafts(mtp, prompts[0][:, 1:], run.hidden[:, :-1])


def verify(
    case: Case, model: oracle.Model, runs: list[oracle.Choices], prompts: list[torch.Tensor]
) -> dict[str, Any]:
    """Check the oracle against fp64, its own cache and the stored files; returns what was found."""
    folder, tensors = HERE / case.name, checkpoint(case)[1]
    with oracle.float64():
        exact = list(runs_of(case, oracle.build(folder, tensors).double(), tensors, prompts))
    for run, reference in zip(runs, exact, strict=True):
        assert reference.logits.dtype == torch.float64
        assert run.margin >= MIN_MARGIN, f"{case.name}: margin {run.margin:.1e}"
        assert run.same_selection(reference), f"{case.name}: fp32 and fp64 choose differently"
    noise = max(a.index_noise(b) for a, b in zip(runs, exact, strict=True))
    decode_error = (oracle.decode(model, prompts[0]) - runs[0].logits).abs().max().item()
    assert decode_error < MAX_DECODE_ERROR, decode_error
    if not case.fp8:
        reread = oracle.prefill(oracle.read_with_transformers(folder), prompts[0])
        assert torch.equal(reread.logits, runs[0].logits), f"{case.name}: file reads differently"
    margins = {
        name: min(getattr(run, name) for run in runs)
        for name in ("index_margin", "expert_margin", "group_margin")
    }
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "weight_seed": case.weight_seed,
        "token_seed": case.token_seed,
        "logits_std": runs[0].logits.std().item(),
        **{k: v if v != float("inf") else None for k, v in margins.items()},
        "index_noise_max": noise[0],
        "index_noise_rms": noise[1],
        "index_score_zeros": runs[0].index_zeros,
        "fp64_max_abs_logit_difference": max(
            (a.logits - b.logits).abs().max().item() for a, b in zip(runs, exact, strict=True)
        ),
        "decode_max_abs_logit_difference": decode_error,
    }


@torch.no_grad()
def write_batch(case: Case, model: oracle.Model, prompts: list[torch.Tensor]) -> float:
    """Write left-padded prompts with the last logits of each alone; returns the oracle's gap."""
    lengths = torch.tensor(case.batch_lengths, dtype=torch.int32)
    longest, pad = max(case.batch_lengths), case.config["pad_token_id"]
    tokens = torch.full((len(prompts), longest), pad, dtype=torch.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - prompt.shape[1] :] = prompt[0]
    last = torch.cat([oracle.prefill(model, prompt).logits[:, -1] for prompt in prompts])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    padded = model(tokens.long(), attention_mask=mask, use_cache=False).logits[:, -1]
    save_file(
        {"tokens": tokens, "lengths": lengths, "last_logits": last},
        HERE / case.name / "expected_batch.safetensors",
    )
    return (padded - last).abs().max().item()


def write(case: Case) -> None:
    """Write all files of one case."""
    folder = write_config(case)
    stored, tensors = checkpoint(case)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model = oracle.build(folder, tensors)
    prompts = make_tokens(case, case.token_seed)
    runs = list(runs_of(case, model, tensors, prompts))
    meta, run = verify(case, model, runs, prompts), runs[0]
    assert sorted(run.topk) == full_layers(case.config)
    expected = {"tokens": prompts[0], "logits": run.logits}
    expected |= {f"topk.{layer}": chosen.contiguous() for layer, chosen in run.topk.items()}
    if case.mtp:
        expected |= {"hidden": run.hidden, "mtp_logits": runs[-1].logits}
        expected["mtp_topk"] = runs[-1].topk[0].contiguous()
    save_file(expected, folder / "expected.safetensors")
    if case.batch_lengths:
        meta["left_pad_max_abs_logit_difference"] = write_batch(case, model, prompts[1:])
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{case.name}: {size / 1e3:.0f} kB", json.dumps(meta, indent=2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden test vectors.")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="try N token seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.cases or CASES:
        if args.search:
            search(CASES[name], args.search)
        else:
            write(CASES[name])


if __name__ == "__main__":
    main()
