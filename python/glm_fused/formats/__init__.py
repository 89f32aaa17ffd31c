"""Weight and cache formats."""
