"""Documents to training rows: corpus, sources, tokenizer training, lanes, packing and the datamodule.

Dependencies point one way: `lanes` (pure order functions) and `sources` know nothing of each other; `documents` has the
interfaces between sources, token readers and rows; `packing` makes rows of a lane; `loader` runs lanes in processes;
`datamodule` is the only file here that knows Lightning.
"""
