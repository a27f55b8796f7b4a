#!/usr/bin/env bash
# Installs what the tests need in .venv and runs them: the fast suite first, then the slow one.
#   bash launch/test.sh [--fast] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/_install.sh

make_venv
install_megaseq test

suites=("not slow" "slow")
if [ "${1:-}" = "--fast" ]; then
  suites=("not slow")
  shift
fi

# One process per core with one thread each is quicker than the reverse: the tests' matrices are tiny.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
workers="${MEGASEQ_TEST_WORKERS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}"
status=0
for suite in "${suites[@]}"; do
  printf '\n== pytest -m "%s"\n' "$suite"
  code=0
  python -m pytest -q -m "$suite" -n "$workers" --dist worksteal "$@" || code=$?
  # 5: no test was selected, which is right where the arguments name a few.
  if [ "$code" -ne 0 ] && ! { [ "$code" -eq 5 ] && [ "$#" -gt 0 ]; }; then
    status=1
  fi
done
exit "$status"
