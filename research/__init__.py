"""Experiments, comparisons and benchmarks. They import the product (`moe_dist`); the product never imports them.

For moe_dist the control routers (`research.routers`) are kinds of another package, whose metadata is in research/installed.
Importing `research` puts this metadata on the path of this process and of its children, as an installation would.
"""

import os
import sys
from pathlib import Path

_HERE = Path(__file__).parent
for _folder in (str(_HERE.parent), str(_HERE / "installed")):
    if _folder not in sys.path:
        sys.path.append(_folder)
    _paths = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if _folder not in _paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*_paths, _folder])
