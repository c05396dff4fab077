"""Imports every module of the code, and prints the version of torch: python -m tests.support.import_all"""

import importlib
import pkgutil
import sys

import torch

failed = []
for top in ("moe_dist", "launchers", "tools"):
    for found in pkgutil.walk_packages(importlib.import_module(top).__path__, f"{top}."):
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            failed.append(f"{found.name}: {error}")
print(f"torch {torch.__version__}: {len(failed)} modules cannot be imported", *failed, sep="\n")
sys.exit(bool(failed))
