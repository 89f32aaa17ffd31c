"""Reading checkpoints: headers, what they hold, and whether it fits the model."""
