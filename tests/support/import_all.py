"""Imports every module of moe_dist, launchers and tools, and prints the version of torch: run it as a program."""

import importlib
import pkgutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
failed = []
for top in ("moe_dist", "launchers", "tools"):
    for found in pkgutil.walk_packages(importlib.import_module(top).__path__, f"{top}."):
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            failed.append(f"{found.name}: {error}")
print(f"torch {torch.__version__}: {len(failed)} modules cannot be imported", *failed, sep="\n")
sys.exit(bool(failed))
