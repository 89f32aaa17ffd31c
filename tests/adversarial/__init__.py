"""Attacks on the package, kept: every case must end in the right result or in one clear error."""
