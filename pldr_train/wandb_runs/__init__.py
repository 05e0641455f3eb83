"""Weights & Biases: what a run's folder holds, shown there. The one room that imports wandb; free of torch."""
