#!/usr/bin/env bash
# Prints the path of a Python that the project can use, or says why none can and exits with 1.
# Looks at $BASE_PYTHON alone where it is set; else for the versions named as arguments, in that order, on PATH and under pyenv and uv.
set -uo pipefail
[ $# -gt 0 ] || set -- 3.12 3.13 3.14 # 3.12 is tested most

probe='
import sys
if sys.version_info < (3, 12):
    sys.exit("is %d.%d: 3.12 or newer is needed" % sys.version_info[:2])
if sys.implementation.name != "cpython":
    sys.exit("is not CPython: jaxlib has no build for it")
if sys.maxsize < 2**32:
    sys.exit("is a 32-bit build: jaxlib has none")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("cannot make environments: %s (Debian and Ubuntu: apt-get install python%d.%d-venv)" % ((error,) + sys.version_info[:2]))
'

candidates() {
  if [ -n "${BASE_PYTHON:-}" ]; then
    printf '%s\n' "$BASE_PYTHON"
    return
  fi
  local version root
  for version in "$@"; do
    type -aP "python$version"
    for root in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions" "${HOME:-}/.local/share/uv/python"; do
      # The newest patch release of the series comes first.
      find "$root" -path "*/bin/python$version" 2>/dev/null | sort -rV
    done
  done
  type -aP python3
  type -aP python
}

refused=""
while IFS= read -r python; do
  if reason=$("$python" -c "$probe" 2>&1); then
    printf '%s\n' "$python"
    exit 0
  fi
  refused+="  $python: $(printf '%s' "$reason" | sed -n '/[^[:space:]]/{p;q;}')"$'\n'
done < <(candidates "$@" | awk '!seen[$0]++')

{
  echo "No suitable Python was found: lserve_jax needs CPython 3.12 or newer with the venv module."
  if [ -n "$refused" ]; then
    echo "Looked at:"
    printf '%s' "$refused"
  else
    echo "There is no python3 on PATH, under pyenv or under uv."
  fi
  echo "Install one (for example: pyenv install 3.12, or apt-get install python3.12 python3.12-venv), or name it: make BASE_PYTHON=PATH ..."
} >&2
exit 1
