"""Off-policy reinforcement learning of language models in JAX, with lag as a treatment variable."""

import sys
from typing import Any

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # a command, such as `python -m oapl_jax.train`, begins with its imports
    _print_error = sys.excepthook

    def _print_error_or_interrupt(kind: Any, error: Any, traceback: Any) -> None:
        """Ends a command by Ctrl-C with a line; a training run has handlers once it is set up."""
        if issubclass(kind, KeyboardInterrupt):
            print("ended by Ctrl-C", file=sys.stderr)
        else:
            _print_error(kind, error, traceback)

    sys.excepthook = _print_error_or_interrupt
