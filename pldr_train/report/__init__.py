"""A run's records as one HTML page, from its files alone: nothing here imports torch or trains."""
