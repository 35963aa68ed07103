#!/usr/bin/env bash
# Writes constraints.txt: what a fresh resolve of the project with all its extras gives on this platform, with jax at the tested version.
# Usage: scripts/lock.sh [JAX_VERSION]
set -euo pipefail
cd "$(dirname "$0")/.."
jax=${1:-0.11.2}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$(scripts/find_python.sh)" -m venv "$scratch/venv"
printf 'jax==%s\njaxlib==%s\n' "$jax" "$jax" >"$scratch/pins.txt"
# An old pip would resolve differently on each machine.
"$scratch/venv/bin/python" -m pip install --quiet --upgrade pip
"$scratch/venv/bin/python" -m pip install --quiet --dry-run --ignore-installed --report "$scratch/report.json" \
  --constraint "$scratch/pins.txt" --editable '.[cuda13,triton,hub,serve,eval,bench,dev]'
"$scratch/venv/bin/python" - "$scratch/report.json" >"$scratch/constraints.txt" <<'EOF'
import json
import sys

report = json.load(open(sys.argv[1]))
python, system = (report["environment"][key] for key in ("python_version", "sys_platform"))
print(f"# Every version that `make` installs; resolved on Python {python}, {system}, by `make lock`. Do not edit.")
pins = {entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"] for entry in report["install"]}
pins.pop("lserve-jax")
print("\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))
EOF
mv "$scratch/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) versions"
