"""The MTP layer in plain NumPy, in float64, written from the description of the model alone.

Nothing is absorbed, fused or cached: every row is computed anew from the tensors of a checkpoint in
the release's layout.
"""

from __future__ import annotations

import numpy as np


class Oracle:
    """The layer of a checkpoint's ``tensors``, as float arrays by name, and its ``config``."""

    def __init__(self, config, tensors):
        self.c = config
        self.w = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
        self.layer = f"model.layers.{config['num_hidden_layers']}"

    def rows(self, tokens, hidden, choices=None):
        """Logits [l, vocab], hidden states [l, hidden] and each row's keys, of rows from 0 on.

        ``tokens`` [l] are each row's, ``hidden`` [l, hidden] the states before them. ``choices``
        are the keys of some rows, by their number; the others choose their own.
        """
        layer = self.layer
        embedded = self.w["model.embed_tokens.weight"][tokens]
        joined = np.concatenate(
            [self._rms(embedded, f"{layer}.enorm"), self._rms(hidden, f"{layer}.hnorm")], axis=1
        )
        x = joined @ self.w[f"{layer}.eh_proj.weight"].T
        attended, chosen = self._attention(self._rms(x, f"{layer}.input_layernorm"), choices or {})
        x = x + attended
        h = self._rms(x, f"{layer}.post_attention_layernorm")
        x = x + np.stack([self._mlp(row) for row in h])
        out = self._rms(x, f"{layer}.shared_head.norm")
        return out @ self.w["lm_head.weight"].T, out, chosen

    def _rms(self, x, name, eps=None):
        eps = self.c["rms_norm_eps"] if eps is None else eps
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.w[f"{name}.weight"]

    def _linear(self, x, name):
        return x @ self.w[f"{self.layer}.self_attn.{name}.weight"].T

    def _rotate(self, x, position):
        """Rotate neighbouring pairs of the last axis."""
        pairs = x.shape[-1] // 2
        theta = self.c["rope_parameters"]["rope_theta"]
        angle = position * theta ** (-np.arange(pairs) / pairs)
        a, b = x[..., 0::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., 0::2] = a * np.cos(angle) - b * np.sin(angle)
        turned[..., 1::2] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    def _attention(self, h, choices):
        c, prefix = self.c, f"{self.layer}.self_attn"
        heads, nope, rope = (
            c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
        )
        rank, length = c["kv_lora_rank"], len(h)
        q_latent = self._rms(self._linear(h, "q_a_proj"), f"{prefix}.q_a_layernorm", 1e-6)
        q = self._linear(q_latent, "q_b_proj").reshape(length, heads, nope + rope)
        kv = self._linear(h, "kv_a_proj_with_mqa")
        latents = self._rms(kv[:, :rank], f"{prefix}.kv_a_layernorm", 1e-6)
        k_pe = np.stack([self._rotate(kv[i, rank:], i) for i in range(length)])
        expanded = self._linear(latents, "kv_b_proj").reshape(length, heads, -1)
        keys, values = expanded[..., :nope], expanded[..., nope:]
        index_keys = self._index_keys(h)
        out, chosen = [], []
        for i in range(length):
            seen = choices.get(i)
            if seen is None:
                seen = self._choose(h[i], q_latent[i], index_keys[: i + 1], i)
            chosen.append(seen)
            q_pe = self._rotate(q[i, :, nope:], i)
            row = []
            for head in range(heads):
                scores = keys[seen, head] @ q[i, head, :nope] + k_pe[seen] @ q_pe[head]
                weights = np.exp((scores - scores.max()) * (nope + rope) ** -0.5)
                row.append(weights / weights.sum() @ values[seen, head])
            out.append(np.concatenate(row))
        return self._linear(np.stack(out), "o_proj"), chosen

    def _index_keys(self, h):
        keys = self._linear(h, "indexer.wk")
        keys = keys - keys.mean(-1, keepdims=True)
        keys = keys / np.sqrt((keys * keys).mean(-1, keepdims=True) + 1e-6)
        norm = f"{self.layer}.self_attn.indexer.k_norm"
        keys = keys * self.w[f"{norm}.weight"] + self.w[f"{norm}.bias"]
        return np.stack([self._index_rotate(key, i) for i, key in enumerate(keys)])

    def _index_rotate(self, x, position):
        rope = self.c["qk_rope_head_dim"]
        return np.concatenate([self._rotate(x[..., :rope], position), x[..., rope:]], axis=-1)

    def _choose(self, h, q_latent, keys, i):
        """The ascending numbers of the keys with the largest scores, of equal ones the first."""
        count, topk = len(keys), self.c["index_topk"]
        if count <= topk:
            return np.arange(count)
        heads, size = self.c["index_n_heads"], self.c["index_head_dim"]
        q = self._index_rotate(self._linear(q_latent, "indexer.wq_b").reshape(heads, size), i)
        weights = self._linear(h, "indexer.weights_proj") * heads**-0.5
        scores = weights @ np.maximum(q @ keys.T * size**-0.5, 0)
        return np.sort(np.argsort(-scores, kind="stable")[:topk])

    def _swiglu(self, x, prefix):
        gate, up, down = (self.w[f"{prefix}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        g = gate @ x
        return down @ (g / (1 + np.exp(-g)) * (up @ x))

    def _mlp(self, x):
        prefix = f"{self.layer}.mlp"
        if f"{prefix}.gate.weight" not in self.w:
            return self._swiglu(x, prefix)
        scores = 1 / (1 + np.exp(-(self.w[f"{prefix}.gate.weight"] @ x)))
        biased = scores + self.w[f"{prefix}.gate.e_score_correction_bias"]
        chosen = np.argsort(-biased, kind="stable")[: self.c["num_experts_per_tok"]]
        weights = scores[chosen] / scores[chosen].sum() * self.c["routed_scaling_factor"]
        routed = sum(
            weight * self._swiglu(x, f"{prefix}.experts.{expert}")
            for weight, expert in zip(weights, chosen, strict=True)
        )
        return routed + self._swiglu(x, f"{prefix}.shared_experts")
