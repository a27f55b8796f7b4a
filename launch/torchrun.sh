#!/usr/bin/env bash
# Trains with torchrun: a process that dies is started again with the others, from the newest checkpoint, and of several
# machines a lost one is left behind (leave parallel.data at 0: what is left).
#   bash launch/torchrun.sh NAME [arguments of megaseq train]
# One machine needs nothing else. For several, run the same command on each, with
#   MEGASEQ_NODES=1:4                 so many machines, at least and at most
#   MEGASEQ_RENDEZVOUS=host:29400     one of them, where all meet
# MEGASEQ_PROCESSES: processes of each machine; default: one for each GPU, or one.
# MEGASEQ_RESTARTS: how often processes may be started again; default: 3.
# MEGASEQ_TORCHRUN: further options of torchrun.
set -euo pipefail

processes="${MEGASEQ_PROCESSES:-}"
if [ -z "$processes" ]; then
  processes="$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)"
  [ "$processes" -gt 0 ] 2>/dev/null || processes=1
fi
options=(--nproc-per-node "$processes" --max-restarts "${MEGASEQ_RESTARTS:-3}")
if [ -n "${MEGASEQ_RENDEZVOUS:-}" ]; then
  options+=(--nnodes "${MEGASEQ_NODES:-1}" --rdzv-backend c10d --rdzv-endpoint "$MEGASEQ_RENDEZVOUS" --rdzv-id megaseq)
  # A machine that says nothing for 30 s is lost; after the first, further ones are waited for, for 20 s.
  options+=(--rdzv-conf "last_call_timeout=20,keep_alive_interval=5,keep_alive_max_attempt=6")
else
  options+=(--standalone)
fi
# Without SIGUSR1 here it would end torchrun and leave its processes behind.
options+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
# How long processes may take to save after a signal; a torchrun that has no such option gives them 30 s.
packages="$("$(dirname "$(command -v torchrun)")/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
if grep -q -e --shutdown-timeout "$packages/torch/distributed/run.py"; then
  options+=(--shutdown-timeout 300)
fi
read -r -a more <<<"${MEGASEQ_TORCHRUN:-}"
exec torchrun "${options[@]}" ${more[@]+"${more[@]}"} --module megaseq train "$@"
