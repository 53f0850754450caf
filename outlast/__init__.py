"""Outlast makes the jobs of a Slurm or PBS cluster outlast the nodes they run on."""

__version__ = "0.1.0"
