"""The run report of many kept rollouts: size of the page, processor time, pauses of a filter.

    PYTHONPATH=.:tests python benchmarks/report.py [--responses=99840]

It makes workdirs with so many responses of 20 and of 200 tokens, writes their pages, and opens
these in Chromium (`make browser`).
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
from typing import Any

from browser import Browser
from made_runs import SIZE, make_run
from results import keep, show

CASES = ((20, 3_000_000), (200, 3_000_000), (200, 30_000_000))  # tokens a response, --max_tokens
SHOWN = "Number(document.querySelector('#where').textContent.split(' ')[0].replace(/\\D/g, ''))"
STOPPED = """new Promise(done => {
  const element = document.getElementById(%r), begun = performance.now();
  let last = begun, longest = 0;
  const turn = () => {
    const now = performance.now();
    longest = Math.max(longest, now - last);
    last = now;
    now > begun + 1000 ? done(longest) : setTimeout(turn, 1);
  };
  element.value = %r;
  element.dispatchEvent(new Event("input", {bubbles: true}));
  setTimeout(turn, 1);
})"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=99_840, help="kept, in each workdir")
    responses = parser.parse_args().responses
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        workdirs = {
            length: str(make_run(root / str(length), steps=responses // (2 * SIZE), length=length))
            for length in {length for length, _ in CASES}
        }
        browser = Browser(root / "profile")
        try:
            for length, most in CASES:
                lines.append(measure(workdirs[length], length, most, browser))
        finally:
            browser.close()
    show(lines)
    keep(lines)


def measure(workdir: str, length: int, most: int, browser: Browser) -> dict[str, Any]:
    page, before = pathlib.Path(workdir) / "report.html", processor_seconds()
    command = [sys.executable, "-m", "oapl_jax.report", workdir, f"--max_tokens={most}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = processor_seconds() - before
    browser.open(page.as_uri())
    assert not browser.errors, browser.errors
    return {
        "tokens a response": length,
        "--max_tokens": f"{most:,}",
        "responses in the page": browser.evaluate(SHOWN),
        "MB": round(page.stat().st_size / 1e6, 1),
        "CPU seconds": round(seconds, 1),
        "filter stops it, s": round(stopped(browser, "verdict", "wrong"), 2),
        "search stops it, s": round(stopped(browser, "search", "answer 1"), 2),
    }


def processor_seconds() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stopped(browser: Browser, element: str, value: str) -> float:
    """Longest time without a turn of the page's timers, in the second after an input."""
    return browser.evaluate(STOPPED % (element, value)) / 1000


if __name__ == "__main__":
    main()
