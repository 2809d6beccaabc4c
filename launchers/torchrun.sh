#!/usr/bin/env bash
# Runs the workers under torchrun, without Ray.
#
# One machine, a worker for each of its GPUs (NPROC_PER_NODE=2 for another number, which a machine without GPUs needs):
#
#   launchers/torchrun.sh configs/llama-3.1-8b.yaml
#
# Several machines: the same command on each, at about the same time, with the run folder on storage that all share:
#
#   NNODES=4 MASTER_ADDR=node1 launchers/torchrun.sh configs/llama-3.1-8b.yaml output_dir=/shared/runs/a
#
# MASTER_ADDR is one of the machines, by a name or address that the others reach; MASTER_PORT must be free there, and
# RDZV_ID tells apart runs that meet at one port. A failed worker ends the workers of all machines, which start again
# from the last checkpoint, MAX_RESTARTS times. `qlora-dist stop RUN_DIR` stops the run with a checkpoint; Ctrl-C and
# kill cost the steps since the last one. The same command again resumes.
set -euo pipefail

config=${1:?usage: launchers/torchrun.sh CONFIG [section.field=value ...]}
shift

nnodes=${NNODES:-1}
if [[ $nnodes == 1 ]]; then
  meet=(--standalone)
else
  : "${MASTER_ADDR:?set MASTER_ADDR to one of the machines, the same on all of them}"
  meet=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}"
    --rdzv-id "${RDZV_ID:-qlora-dist}")
fi

# A mistake in the configuration is told once here and not by every worker, again and again.
qlora-dist config show "$config" launch.backend=torchrun "$@" > /dev/null

exec torchrun "${meet[@]}" --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" \
  -m qlora_dist.cli train "$config" launch.backend=torchrun "$@"
