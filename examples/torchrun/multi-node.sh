#!/usr/bin/env bash
# Several machines without a scheduler. Start this on each, with the same words but for the node's own number:
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/torchrun/multi-node.sh --config examples/llama-1b.yaml \
#       --save /shared/runs/1b --load /shared/runs/1b ...
#
# MASTER_ADDR is the machine with NODE_RANK=0. The folder of checkpoints is on a file system that all machines see.
set -eu
cd "$(dirname "$0")/../.."
: "${NODES:?how many machines}" "${NODE_RANK:?number of this machine, from 0}" "${MASTER_ADDR:?the machine with NODE_RANK=0}"
processes=${PROCESSES_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE_RANK" \
    --nproc-per-node "$processes" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" pretrain.py "$@"
