"""Text from a model: prompts, sampling, stop texts, tokenizer."""
