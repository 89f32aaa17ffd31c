"""Which prompts are taken together."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row


def group(rows: Sequence[Row], most: int) -> list[Row]:
    """The first of some texts, and those whose prompts are taken together with its prompt.

    Prompts are padded to the longest of them. So together are those of similar lengths, with up to
    a fifth of padding, and no more than ``most`` tokens: several that are longer than a chunk by
    themselves gain nothing, and each would wait for the others.
    """
    found, total, longest = [rows[0]], rows[0].prompt_tokens, rows[0].prompt_tokens
    for row in rows[1:]:
        size, length = total + row.prompt_tokens, max(longest, row.prompt_tokens)
        padded = length * (len(found) + 1)
        if padded <= most and 4 * padded <= 5 * size:
            found.append(row)
            total, longest = size, length
    return found
