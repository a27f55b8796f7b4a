# Shell functions that launch/test.sh and launch/quickstart.sh share. Source it; it runs nothing by itself.
#   make_venv               makes .venv in the repository's root, or keeps the one that is there, and activates it
#   install_megaseq EXTRAS  installs megaseq from this tree with tested versions; EXTRAS like "test" or "test,wandb", or ""
# Scheduler and machine facts only: MEGASEQ_PYTHON names the interpreter (default: the newest one of at least 3.11).

MEGASEQ_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_say() { printf 'megaseq: %s\n' "$*" >&2; }

_has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

_find_python() {
  local name
  for name in ${MEGASEQ_PYTHON:+"$MEGASEQ_PYTHON"} python3 python python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return 0
    fi
  done
  _say "launch: must have Python 3.11 or newer, but none is on the PATH. Install it, or set MEGASEQ_PYTHON to it."
  return 1
}

make_venv() {
  local venv="$MEGASEQ_ROOT/.venv" python options=()
  # A venv whose interpreter has gone (a moved tree, an upgraded system) is made anew.
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(_find_python)" || return 1
    # GPU machines keep the torch that was installed for their driver.
    _has_nvidia_gpu && options+=(--system-site-packages)
    _say "making .venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "${options[@]}" "$venv"; then
      _say "launch: must have Python's venv module, but it does not work here. Install it (Debian: python3-venv)."
      rm -rf "$venv"
      return 1
    fi
  fi
  VIRTUAL_ENV="$venv"
  PATH="$venv/bin:$PATH"
  export VIRTUAL_ENV PATH
  unset PYTHONHOME
}

_install_stamp() {
  # What an installation depends on. Python sources do not count: the installation is editable.
  (cd "$MEGASEQ_ROOT" && printf '%s\n' "$MEGASEQ_ROOT" "$(command -v c++ g++ clang++)" &&
    cat pyproject.toml setup.py constraints.txt CMakeLists.txt megaseq/csrc/*) | cksum
}

_is_installed() {
  # $1: extras, $2: the tree's stamp, $3: file of "STAMP EXTRAS" lines. Any installation of this tree has what "" asks for.
  [ -f "$3" ] && if [ -n "$1" ]; then grep -qxF "$2 $1" "$3"; else grep -qF "$2 " "$3"; fi
}

_gpu_constraints() {
  # Prints the tested versions, with this machine's torch in place of the tested one: pip would exchange it without a word
  # where another line does not suit it. A torch that megaseq cannot use is not kept.
  grep -viE '^(torch|triton|nvidia[-_a-z0-9]*)[=<>]' "$MEGASEQ_ROOT/constraints.txt" &&
    "$VIRTUAL_ENV/bin/python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

try:
    torch = version("torch")
except PackageNotFoundError:
    torch = "0.0"
if tuple(int(part) for part in torch.split(".")[:2]) >= (2, 11):
    print(f"torch=={torch}")
PYTHON
}

install_megaseq() {
  local extras="$1" stamp="$VIRTUAL_ENV/megaseq.stamp" constraints="$MEGASEQ_ROOT/constraints.txt" now
  now="$(_install_stamp)"
  if ! _is_installed "$extras" "$now" "$stamp"; then
    if _has_nvidia_gpu; then
      constraints="$VIRTUAL_ENV/constraints.txt"
      _gpu_constraints >"$constraints" || return 1
    fi
    _say "installing megaseq${extras:+[$extras]} and what it needs in .venv"
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" \
      -e "$MEGASEQ_ROOT${extras:+[$extras]}" || return 1
    printf '%s\n' "$now $extras" >>"$stamp"
  fi
  # pip hides what the build printed, so whether there is a C++ extension is said here.
  "$VIRTUAL_ENV/bin/python" -c 'from megaseq.base import native; print(native.describe())' >&2
}
