"""What a run writes: checkpoints in the release's layout, and its own state to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimizer import Optimizer
from text import save_tokenizer
from transformers import GenerationConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast


def save(model: GlmMoeDsaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint in the release's layout: bf16, one tensor per expert and projection."""
    copy = GlmMoeDsaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    source = dict(model.state_dict())
    for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "indexer.weights_proj.weight")):
            tensor.data = source[name].detach().float().clone()
    copy.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    copy.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_state(
    file: Path, model: GlmMoeDsaForCausalLM, optimizer: Optimizer, counts: dict[str, Any]
) -> None:
    """Write all that a run needs to go on; an interruption leaves the file before it whole."""
    new = file.with_suffix(".new")
    torch.save({**counts, "model": model.state_dict(), **optimizer.state()}, new)
    new.replace(file)


def load_state(file: Path, model: GlmMoeDsaForCausalLM, optimizer: Optimizer) -> dict[str, Any]:
    """Take model and optimizer back from ``file``; returns the rest of what it holds."""
    state = torch.load(file)
    model.load_state_dict(state["model"])
    optimizer.load_state(state)
    return state
