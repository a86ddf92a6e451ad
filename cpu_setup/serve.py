"""SGLang's server on a CPU, with stubs for its GPU packages, in an environment of its own.

Its processes are forked, not spawned, so that SGLang is imported once: a start takes a third of the
CPU time.

    make sglang
    .venv-sglang/bin/python cpu_setup/serve.py --model-path=DIR --port=30000

Flags are SGLang's; the CPU's have defaults here. A model whose tokenizer has no English
letters needs --skip-tokenizer-init.
"""

import os
import sys
import types

# On few cores the server is ten times slower with more OpenMP threads. Rotary angles in the model's
# dtype cost three digits of the log-probs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SGLANG_ROPE_CACHE_FP32", "1")
os.environ.update(SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch

CPU_FLAGS = [
    "--device=cpu",
    "--dtype=float32",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # otherwise an idle server keeps a core busy
    "--page-size=1",
    "--max-running-requests=32",
    "--max-total-tokens=16384",
    "--enable-metrics",
    "--lora-backend=torch_native",
]


class Absent(types.ModuleType):
    """Stub of a package whose functions SGLang imports and does not call on a CPU."""

    __version__ = "0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"{self.__name__}.{name}: the package is not installed")

        return missing


# At the top level, since SGLang's child processes import this file.
sys.modules["sgl_kernel"] = Absent("sgl_kernel")  # has no CPU wheel
# torchvision's compiled operators need CUDA; its Python part, which SGLang imports, needs their
# declarations.
vision = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    vision.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def unpinned(make):
    """A factory of tensors that ignores `pin_memory`, as only an accelerator has pinned memory."""

    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made


if "--enable-lora" in sys.argv:  # SGLang pins the sizes of adapters without asking for a GPU
    for factory in ("tensor", "empty", "zeros", "arange"):
        setattr(torch, factory, unpinned(getattr(torch, factory)))
    torch.Tensor.pin_memory = lambda self, *_: self

if __name__ == "__main__":
    import gc
    import importlib
    import multiprocessing
    import runpy

    gc.disable()  # a fifth of the time of these imports
    importlib.import_module("sglang.srt.entrypoints.http_server")
    gc.freeze()
    gc.enable()
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None  # SGLang sets "spawn"
    sys.argv[1:1] = CPU_FLAGS
    runpy.run_module("sglang.launch_server", run_name="__main__")
