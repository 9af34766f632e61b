"""What watches a run: progress on the terminal, metrics in files, checkpoints, signals."""

from dssp.callbacks.checkpointing import Checkpointing
from dssp.callbacks.interruption import Interruption
from dssp.callbacks.metrics_log import MetricsLog
from dssp.callbacks.progress import ProgressBar
from dssp.callbacks.tensorboard import TensorBoard

__all__ = ["Checkpointing", "Interruption", "MetricsLog", "ProgressBar", "TensorBoard"]
