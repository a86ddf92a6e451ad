"""sglang-router in SGLang's environment.

    .venv-sglang/bin/python cpu_setup/route.py --port=31000 --worker-urls http://127.0.0.1:30000

Flags are the router's. It imports SGLang for traces only; this program prevents the slow import.
"""

import runpy
import sys

if __name__ == "__main__":
    sys.modules["sglang"] = None  # an import raises ImportError, which the router expects
    runpy.run_module("sglang_router.launch_router", run_name="__main__")
