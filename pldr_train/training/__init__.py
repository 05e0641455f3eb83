"""Training: the Lightning module, the strategies, and what happens between two steps."""
