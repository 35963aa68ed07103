#!/usr/bin/env bash
# Makes .venv where it is missing or broken and installs the project into it, editable, at the versions of constraints.txt.
# Usage: scripts/install.sh [EXTRAS], EXTRAS separated by commas. pip's own configuration is used as it is; its full log is .venv/install.log.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

if ! .venv/bin/python -c 'import sys, pip; assert sys.version_info >= (3, 12)' 2>/dev/null; then
  base=$(scripts/find_python.sh)
  echo "Creating .venv with $("$base" --version) ($base)"
  rm -rf .venv
  "$base" -m venv .venv
fi

echo "Installing lserve_jax${extras:+ with $extras} into .venv (the first time this takes some minutes)"
# Of what pip says, the larger downloads, the installation and trouble are passed on.
.venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off --log .venv/install.log \
  --constraint constraints.txt --editable ".${extras:+[$extras]}" 2>&1 | awk '
    /^(Looking in|Obtaining|Collecting|Processing|Requirement already|Created wheel|  Created wheel|Building wheels|Successfully)/ { next }
    /^ *(Installing (build|backend) dep|Checking if|Getting requirements|Preparing (editable )?metadata|Using cached|Obtaining dependency|Link requires|Stored in|Building editable|Attempting uninstall|Found existing|Uninstalling|Successfully)/ { next }
    /^WARNING: Location .* is ignored/ { next }
    /^ *Downloading .*(\.metadata| [kM]?B metadata| k?B\)| bytes\))/ { next }
    /^ *Downloading link/ { next }
    /^Installing collected packages/ { print "  Installing " NF - 3 " packages"; fflush(); next }
    { print; fflush() }'

# The compiler for GPUs, with which tests compile kernels where no GPU is. Where JAX would find it, it would look for a GPU.
if [[ ",$extras," == *,dev,* && $(uname -sm) == "Linux x86_64" ]]; then
  echo "Installing the compiler for GPUs into .venv/gpu-compiler"
  rm -rf .venv/gpu-compiler
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --target .venv/gpu-compiler \
    --constraint constraints.txt jax-cuda13-plugin jax-cuda13-pjrt 2>&1 | { grep -v '^WARNING: Location .* is ignored' || true; }
fi
