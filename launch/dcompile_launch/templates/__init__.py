"""Job files to start from: ``dcompile-launch --template slurm > job.sh``."""

from __future__ import annotations

from importlib.resources import files

TEMPLATES = {"slurm": "slurm.sh", "kubernetes": "kubernetes.yaml", "mpi": "mpi.sh"}
"""File of each template."""


def template(name: str) -> str:
    """The text of a template.

    Raises:
        KeyError: no template has this name.
    """
    return files(__package__ or __name__).joinpath(TEMPLATES[name]).read_text()
