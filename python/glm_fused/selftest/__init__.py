"""``glm-fused selftest``: every kernel against its reference and golden digests, and its speed."""
