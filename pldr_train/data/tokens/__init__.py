"""Documents that are tokenised ahead of training: the files that hold their tokens, written and read."""
