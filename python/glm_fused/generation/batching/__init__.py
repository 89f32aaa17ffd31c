"""Several texts at once: requests, their turns, and the steps that they share."""
