"""Converts checkpoints: to GGUF files, and to folders in MLX's formats."""
