#!/usr/bin/env bash
# Trains on the machines of a hostfile with the DeepSpeed launcher, which reaches them over ssh with pdsh.
#   bash launch/deepspeed.sh HOSTFILE NAME [arguments of megaseq train]
# MEGASEQ_DEEPSPEED holds further options of the launcher, as "--launcher openmpi" or "--master_addr 10.0.0.1".
set -euo pipefail

if [ "$#" -lt 2 ]; then
  echo "megaseq: launch/deepspeed.sh: must be given a hostfile and an experiment, but is given $# arguments." >&2
  exit 2
fi
hostfile="$1"
shift

# A typing error, and a layout that does not work, are told in one line here, and by the launcher on every machine.
# Where the launcher is to use some of the slots only, there are fewer processes than the hostfile says.
case " ${MEGASEQ_DEEPSPEED:-}" in
  *" -i"* | *" -e"* | *" --include"* | *" --exclude"* | *" --num_"*) megaseq hosts "$hostfile" ;;
  *) megaseq hosts "$hostfile" "$@" ;;
esac

# `--launcher slurm` calls srun, which since Slurm 22.05 does not take over what the job was given for a task.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
fi

read -r -a options <<<"${MEGASEQ_DEEPSPEED:-}"
exec deepspeed --hostfile "$hostfile" ${options[@]+"${options[@]}"} --module megaseq train "$@"
