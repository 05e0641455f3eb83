"""Documents to training rows.

`documents` has the interfaces. `sources` reads documents as they are stored, `tokens` those that were tokenised ahead,
`tokenizer` is what turns one into the other, `rows` makes training rows of both. `datamodule` brings them together; it
is the only file here that knows Lightning.
"""
