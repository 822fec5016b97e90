"""dcompile: a distributed training compiler for PyTorch.

    model = dcompile.data_parallel(model)
    step = torch.compile(model, backend="dcompile")

Public names: ``compile``, ``calibrate``, ``Options``, ``data_parallel``, ``fully_sharded``, ``explain``, ``counters``,
``reset_counters``, ``communication_summary``, ``trace``.
"""

from dcompile.backend import calibrate, compile, counters, dcompile, reset_counters
from dcompile.explanation import CommunicationSummary, Explanation, communication_summary, explain, trace
from dcompile.options import Options
from dcompile.parallel import data_parallel
from dcompile.sharded import fully_sharded

__version__ = "0.1.0"

__all__ = [
    "CommunicationSummary",
    "Explanation",
    "Options",
    "calibrate",
    "communication_summary",
    "compile",
    "counters",
    "data_parallel",
    "dcompile",
    "explain",
    "fully_sharded",
    "reset_counters",
    "trace",
]
