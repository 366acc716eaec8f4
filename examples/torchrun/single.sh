#!/usr/bin/env bash
# All GPUs of this machine:
#
#   examples/torchrun/single.sh --config examples/llama-1b.yaml --save runs/1b --load runs/1b ...
#
# A run that is asked to stop (SIGUSR1 or SIGTERM to its processes) saves; started again, it resumes. With RESTARTS=3 one
# whose process dies is started again up to three times; so is one that was asked to stop, unless torchrun itself was.
set -eu
cd "$(dirname "$0")/../.."
processes=${PROCESSES_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
# A store for each start: the one that torchrun keeps over restarts holds the addresses of processes that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    --max-restarts "${RESTARTS:-0}" pretrain.py "$@"
