"""The model: configuration, layers, caches and the names of its tensors."""
