"""Training: the Lightning module, its callbacks, checkpoints and the run's folder."""
