"""Progress of a run on the terminal, and stop requests by signals."""

import signal
import sys
from collections.abc import Mapping
from typing import Any

import tqdm

SHOWN = {
    "reward": "reward",
    "eval/pass@1": "pass@1",
    "loss": "loss",
    "lag/mean": "lag",
    "entropy": "entropy",
}


class Progress:
    """Progress bar on a terminal; elsewhere a plain line at every twentieth of the steps."""

    def __init__(self, what: str, num_steps: int, start: int):
        self._what, self._num_steps = what, num_steps
        self._every = max(num_steps // 20, 1)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=start, desc=what, file=sys.stderr)

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        values = {name: f"{line[key]:.3f}" for key, name in SHOWN.items() if key in line}
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step == self._num_steps:
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            print(f"{self._what} {step}/{self._num_steps}  {shown}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def log(text: str) -> None:
    """Prints a line without breaking the bar."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class StopRequest:
    """Records SIGTERM and Ctrl-C, so that the loop saves and exits; a second one exits at once."""

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        if self.requested:
            raise SystemExit(128 + number)
        self.requested = signal.Signals(number).name
