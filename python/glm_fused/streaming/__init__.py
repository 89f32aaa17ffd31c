"""Routed experts from disk: sources, the slot bank, the memory plan, traces."""
