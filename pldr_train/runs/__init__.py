"""A run's folder: its files by name, how they are written, locked and read."""
