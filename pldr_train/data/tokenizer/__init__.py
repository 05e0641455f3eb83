"""SentencePiece tokenizers: their special pieces, their settings, training and measuring them."""
