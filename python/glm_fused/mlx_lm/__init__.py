"""mlx-lm's own tools with this package's models."""
