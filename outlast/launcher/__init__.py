"""A web page for one user's jobs: commands, control messages and output, as the CLI has them in a terminal.

It is a process of that user's, and can do what he can do: it starts sbatch, scontrol and scancel, asks the
watcher over its socket, and reads files, all as himself.
"""

from outlast.launcher._serve import Options, serve

__all__ = ["Options", "serve"]
