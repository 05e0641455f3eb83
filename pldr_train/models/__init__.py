"""Models in and out of other formats: export, import, G of a trained model."""
