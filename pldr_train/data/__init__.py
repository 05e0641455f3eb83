"""Documents to training rows: corpus, sources, tokenizer training, lanes, packing and the datamodule.

Dependencies point one way: `lanes` (pure order functions) and `sources` know nothing of each other; `packing` joins
them into rows; `loader` runs rows in processes; `datamodule` is the only file here that knows Lightning.
"""
