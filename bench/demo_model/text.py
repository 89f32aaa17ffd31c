"""The demo model's tokenizer, and batches of the training text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SPLIT_PATTERN = r"\r?\n *| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+| +|\s"
VOCAB_SIZE = 2048


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose words keep newline and indentation together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 both load it."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n")


def kept_tokenizer(texts: list[str], folder: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer kept in ``folder``; trained, and kept there, where there is none."""
    if folder is not None and (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = train_tokenizer(texts)
    if folder is not None:
        save_tokenizer(tokenizer, folder)
    return tokenizer


def encode_files(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Encode every text, each opened by the end-of-text token."""
    eos = tokenizer.eos_token_id
    return [[eos, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


class Batches:
    """Endless shuffled batches of token windows; files are re-shuffled in every epoch."""

    def __init__(self, files: list[list[int]], seed: int) -> None:
        self.files = files
        self.random = random.Random(seed)
        self.stream: list[int] = []
        self.windows: list[int] = []
        self.epochs = 0
        self.length = 0

    def _refill(self, length: int) -> None:
        order = self.files[:]
        self.random.shuffle(order)
        self.stream = [token for ids in order for token in ids]
        start = self.random.randrange(length)
        self.windows = list(range(start, len(self.stream) - length - 1, length))
        self.random.shuffle(self.windows)
        self.epochs += 1
        self.length = length

    def _join_windows(self) -> None:
        """Keep what is left of the epoch at twice the length, where both halves are unread."""
        unread = set(self.windows)
        self.windows = []
        for start in sorted(unread):
            if start in unread and start + self.length in unread:
                self.windows.append(start)
                unread -= {start, start + self.length}
        self.random.shuffle(self.windows)
        self.length *= 2

    def next(self, count: int, length: int) -> Tensor:
        """Return ``[count, length + 1]`` tokens (inputs and targets overlap by all but one)."""
        if self.windows and length == 2 * self.length:
            self._join_windows()
        if len(self.windows) < count or length != self.length:
            self._refill(length)
        starts = [self.windows.pop() for _ in range(count)]
        return torch.tensor([self.stream[s : s + length + 1] for s in starts])
