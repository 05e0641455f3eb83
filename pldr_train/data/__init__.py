"""Documents to training rows.

`documents` has the interfaces. `sources` reads documents as they are stored, `tokens` those that were tokenised ahead,
`tokenizer` trains the tokenizers between them, `rows` makes training rows. Of the folders rows, sources, tokenizer and
tokens each imports only those before it. `datamodule` wires all; only it knows Lightning.
"""
