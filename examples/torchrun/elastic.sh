#!/usr/bin/env bash
# Machines that may die and come back, without a scheduler. Start this on each, with the same words but for its address:
#
#   NODES=1:2 HEAD=10.0.0.1 ADDRESS=10.0.0.2 examples/torchrun/elastic.sh --config examples/llama-1b.yaml \
#       --save /shared/runs/1b --load /shared/runs/1b --distributed-timeout-seconds-after-init 600 ...
#
# All meet at HEAD, the address of one of them, which has to live: without it, start anew. NODES is how many machines
# there must be and how many there may be: with 1:2 the one that is left goes on alone, with 2 it waits for another. A
# machine that was away joins where this is started on it again. The global batch stays what it is, so it must be a
# multiple for every number of machines. The folder of checkpoints is on a file system that all machines see.
set -eu
cd "$(dirname "$0")/../.."
: "${NODES:?how many machines, e.g. 1:2}" "${HEAD:?where all meet}" "${ADDRESS:?of this machine, as others reach it}"
processes=${PROCESSES_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
head=0
if [ "$ADDRESS" = "$HEAD" ]; then head=1; fi
# A store for each start. The one that torchrun keeps over restarts holds the addresses of processes that are gone, and
# machines that join later aren't told of it (PyTorch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$processes" \
    --max-restarts "${RESTARTS:-100}" --local-addr "$ADDRESS" \
    --rdzv-id "${JOB:-pretrain}" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${MASTER_PORT:-29400}" \
    --rdzv-conf "is_host=$head,join_timeout=${JOIN_TIMEOUT:-3600},last_call_timeout=${LAST_CALL:-60}" pretrain.py "$@"
