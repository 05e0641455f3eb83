"""Checkpoints: what they hold, how they are written, found, verified and converted."""
