#!/bin/sh
# Installs the wheels of /wheels into /opt/moe_dist, and nothing that their lock file does not name.
set -eu
python3 -m venv /opt/moe_dist
/opt/moe_dist/bin/pip install --no-cache-dir --no-index --find-links /wheels --require-hashes -r /wheels/requirements.lock
# Pods start `python -m launchers.ray` and `launchers.kubernetes.pod`, so these packages are on the path.
/opt/moe_dist/bin/python - <<'PYTHON'
import sysconfig
from pathlib import Path

packages = Path(sysconfig.get_paths()["purelib"])
(packages / "moe_dist_bundled.pth").write_text(f"{packages / 'moe_dist' / 'bundled'}\n")
PYTHON
