"""Fails unless a wheel holds exactly the files that git tracks in both packages, data too: check_wheel.py WHEEL."""

import subprocess
import sys
import zipfile

tracked = subprocess.run(
    ["git", "ls-files", "lserve_jax", "pallas_kernels"], capture_output=True, text=True, check=True
)
expected = set(tracked.stdout.splitlines())
packed = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
data = sorted(name for name in packed if not name.endswith(".py"))
for problem, names in (
    ("missing from the wheel", expected - packed),
    ("not tracked, yet in the wheel", packed - expected),
):
    if names:
        sys.exit(f"{problem}: {', '.join(sorted(names))}")
if not data:
    sys.exit("the wheel holds no package data")
print(f"wheel: {len(packed)} files; data: {', '.join(data)}")
