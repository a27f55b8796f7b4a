#!/usr/bin/env bash
# From nothing to a trained, decoded and scored model: installs megaseq in .venv, trains quickstart.Numbers, decodes the
# values that training never saw. Arguments are params of the experiment, as train.max_steps=100.
#   bash launch/quickstart.sh [path=value ...]
# MEGASEQ_RUN_DIR names the run directory; where it holds a run already, that run goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/_install.sh

make_venv
install_megaseq ""

run_dir="${MEGASEQ_RUN_DIR:-runs/quickstart}"
megaseq train quickstart.Numbers --run-dir "$run_dir" "$@"

cat <<TEXT

The run is in $run_dir: params.yaml, metrics.jsonl, checkpoints/, decodes/. Go on with
  source .venv/bin/activate
  echo "<fr> seven thousand and eleven" | megaseq decode $run_dir --input -
  megaseq params list
TEXT
