#!/bin/sh
# Runs `moe-dist gpu-check` from this folder without a network: sh gpu-check.sh [--gpus N] [--minutes 9] [--rehearse] ...
# PYTHON names a Python 3.11 or 3.12 that has torch and triton. All arguments go to the command.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
packages=$here/packages-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ ! -e "$packages/.installed" ]; then
  rm -rf "$packages"
  install() { "$python" -m pip install --quiet --no-index --find-links "$here/wheels" --target "$packages" "$@"; }
  install -r "$here/requirements.txt"
  install --no-deps --upgrade -r "$here/requirements-alone.txt"
  touch "$packages/.installed"
fi
PYTHONPATH="$here:$packages${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m moe_dist gpu-check --json "$here/gpu_check.json" "$@"
