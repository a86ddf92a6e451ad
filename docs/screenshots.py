r"""Writes the pictures of docs/report.md: the report of some runs, light and dark, in Chromium.

    for objective in oapl grpo; do for seed in 0 1; do
      python -m oapl_jax.train --config=configs/arithmetic.py:objective=$objective \
        --workdir=runs/report/$objective-$seed --config.seed=$seed --config.num_steps=64 \
        --config.evaluation.every=8 --config.warmup.num_steps=300
    done; done
    PYTHONPATH=.:tests python docs/screenshots.py runs/report/*
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from browser import Browser
from PIL import Image

TO = Path(__file__).parent / "report"
FILTERS = {"step-min": "40", "reward-min": "1"}  # of the rollout viewer


def main() -> None:
    workdirs = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        page, profile = Path(directory) / "report.html", Path(directory) / "profile"
        command = [sys.executable, "-m", "oapl_jax.report", *workdirs, f"--out={page}"]
        subprocess.run(command, check=True)
        browser = Browser(profile)
        try:
            browser.open(page.as_uri())
            for name, value in FILTERS.items():
                browser.fill(name, value)
            browser.evaluate("document.querySelector('#list tbody tr:nth-child(5)').click()")
            for theme in ("light", "dark"):
                browser.prefer(theme)
                browser.wait(f"document.documentElement.dataset.theme == {theme!r}")
                for section in ("curves", "rollouts"):
                    picture = TO / f"{section}-{theme}.png"
                    browser.screenshot(picture, f"#{section}")
                    Image.open(picture).convert("RGB").quantize().save(picture, optimize=True)
            assert not browser.errors, browser.errors
        finally:
            browser.close()


if __name__ == "__main__":
    main()
