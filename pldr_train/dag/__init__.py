"""The DAG loss: how far a deductive output, read as a weighted graph, is from acyclic."""

from .log_trace_exp import log_trace_exp
from .loss import TENSOR_NAMES, DagCoefficients, DagLoss, LayerOutputs, dag_loss, schedule_factor

__all__ = ["TENSOR_NAMES", "DagCoefficients", "DagLoss", "LayerOutputs", "dag_loss", "log_trace_exp", "schedule_factor"]
