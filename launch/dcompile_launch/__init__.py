"""Starts the ranks of a training program: ``dcompile-launch script.py args...`` or ``python -m dcompile_launch``."""

from dcompile_launch.elastic import Job, launch
from dcompile_launch.inplace import Task, find_task

__all__ = ["Job", "Task", "find_task", "launch"]
