"""Tasks of lm-evaluation-harness on a PLDR-LLM, and the scoring of continuations beneath them."""
