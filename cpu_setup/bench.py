"""SGLang's own benchmark client, in SGLang's environment; see benchmarks/fleet.py.

.venv-sglang/bin/python cpu_setup/bench.py --backend=sglang --port=30000 ...
"""

import runpy
import sys

import serve  # stubs of missing packages

if __name__ == "__main__":
    sys.modules["datasets"] = serve.Absent("datasets")  # used for downloaded prompts only
    runpy.run_module("sglang.benchmark.serving", run_name="__main__")
