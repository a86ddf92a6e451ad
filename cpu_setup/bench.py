"""SGLang's own benchmark client, in SGLang's environment; see benchmarks/fleet.py.

.venv-sglang/bin/python cpu_setup/bench.py --backend=sglang --port=30000 ...
"""

import runpy
import sys

import serve  # its stand-ins

if __name__ == "__main__":
    sys.modules["datasets"] = serve.Absent("datasets")  # for prompts that are downloaded
    runpy.run_module("sglang.benchmark.serving", run_name="__main__")
