#!/usr/bin/env bash
# Runs the workers under `accelerate launch`, for people whose machines are set up for it:
#
#   launchers/accelerate.sh configs/llama-3.1-8b.yaml                                  # one machine
#   MACHINE_RANK=1 launchers/accelerate.sh configs/x.yaml output_dir=/shared/runs/a    # several: a rank each, from 0
#
# Machines, workers and the first machine's address are in launchers/accelerate.yaml; ACCELERATE_CONFIG names another
# file, such as what `accelerate config` wrote. NUM_PROCESSES goes over its number of workers. The run folder is on
# storage that all machines share. `qlora-dist stop RUN_DIR` stops the run with a checkpoint; Ctrl-C and kill cost the
# steps since the last one, and so does a worker that dies: accelerate does not start it again, the same command does.
set -euo pipefail

config=${1:?usage: launchers/accelerate.sh CONFIG [section.field=value ...]}
shift

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
over=()
[[ -z ${MACHINE_RANK:-} ]] || over+=(--machine_rank "$MACHINE_RANK")
[[ -z ${NUM_PROCESSES:-} ]] || over+=(--num_processes "$NUM_PROCESSES")

# A mistake in the configuration is told once here and not by every worker, again and again.
qlora-dist config show "$config" launch.backend=torchrun "$@" > /dev/null

exec accelerate launch --config_file "${ACCELERATE_CONFIG:-$here/accelerate.yaml}" "${over[@]}" \
  --module qlora_dist.cli train "$config" launch.backend=torchrun "$@"
