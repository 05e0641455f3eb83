"""pldr_train: pretraining of PLDR-LLMs and the study of their DAG loss."""

__version__ = "0.1.0"
