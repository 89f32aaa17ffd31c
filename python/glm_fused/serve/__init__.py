"""Serves a model over HTTP: `glm-fused serve`."""
