"""Caches of earlier texts, in memory and in files, for those that begin like them."""
