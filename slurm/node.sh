#!/bin/bash
# One node's part of a job, started by srun on each: `node.sh ray`, or `node.sh torchrun CONFIG [OVERRIDES]`.

case $1 in
    ray)
        words=(--block --disable-usage-stats --num-cpus="$((SLURM_CPUS_ON_NODE > WORKERS_PER_NODE ? SLURM_CPUS_ON_NODE : WORKERS_PER_NODE))"
            --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=$((BASE_PORT + 10 + SLURM_NODEID)))
        [[ -z ${RAY_OBJECT_STORE_BYTES:-} ]] || words+=(--object-store-memory="$RAY_OBJECT_STORE_BYTES")
        if ((SLURM_NODEID == 0)); then
            words+=(--head --port="$BASE_PORT" --node-ip-address="$HEAD_ADDRESS" --include-dashboard=false
                --ray-client-server-port=$((BASE_PORT + 1)) --temp-dir="$JOB_TMP")
        else
            words+=(--address="$RAY_ADDRESS")
        fi
        # The variable is for drivers; `ray start` takes it for the cluster to start beside.
        unset RAY_ADDRESS
        # Nothing else runs on this cluster that it could wait for.
        export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
        "$PYTHON" -m ray.scripts.scripts start "${words[@]}" &
        child=$!
        # Slurm may kill all that is left a few seconds after its SIGTERM.
        trap 'kill -TERM $child; sleep 2; rm -rf "$JOB_TMP"' TERM
        while kill -0 $child 2>/dev/null; do wait $child; done
        rm -rf "$JOB_TMP"
        ;;
    torchrun)
        shift
        # srun passes on every signal that the job gets; a run that is to write a checkpoint must not die of one.
        trap '' TERM USR1
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-10}
        here=$HEAD_ADDRESS
        ((SLURM_NODEID == 0)) || here=$("$PYTHON" -c 'import sys
from qlora_dist.cluster.network import address_towards
print(address_towards(sys.argv[1]))' "$HEAD_ADDRESS")
        exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$WORKERS_PER_NODE" \
            --max-restarts "$MAX_RESTARTS" --monitor-interval 0.5 --signals-to-handle SIGINT --local-addr "$here" \
            --rdzv-backend c10d --rdzv-endpoint "$HEAD_ADDRESS:$BASE_PORT" --rdzv-id "$SLURM_JOB_ID" \
            --rdzv-conf "is_host=$((SLURM_NODEID == 0))" -m qlora_dist.cli train "$@"
        ;;
esac
