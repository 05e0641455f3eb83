"""Files that hold a predefined G."""
