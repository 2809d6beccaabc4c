#!/usr/bin/env bash
# Tokens/s of whole training runs on a Ray cluster, as a Ray job, on random weights, so that nothing is downloaded:
#
#   export RAY_API_SERVER_ADDRESS=http://HOST:8265     # where `ray start --head` said that the dashboard is
#   export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...      # where the cluster wants a token
#   launchers/ray_bench.sh /shared/bench.json --model llama-3.1-70b \
#     --set launch.num_workers=16 --set shard.strategy=fsdp,hybrid
#
# The rest goes to `qlora-dist bench throughput` (docs/bench.md). The JSON, which must lie on storage that all nodes
# share, gets its table (.md) and picture (.png) beside it, with rows for each node and each rank.
# What to change: PYTHON, where the cluster's Python that has qlora-dist is not `python`.
set -euo pipefail

out=${1:?usage: launchers/ray_bench.sh /SHARED/OUT.json [options of qlora-dist bench throughput]}
shift

exec ray job submit \
  --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
  --runtime-env-json '{"env_vars": {"PYTHONUNBUFFERED": "1"}}' \
  -- "${PYTHON:-python}" -m qlora_dist.cli bench throughput --out "$out" --scratch "${out%.json}.scratch" \
  --set launch.backend=ray "$@"
