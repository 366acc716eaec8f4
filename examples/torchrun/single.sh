#!/usr/bin/env bash
# All GPUs of this machine:
#
#   examples/torchrun/single.sh --config examples/llama-1b.yaml --save runs/1b --load runs/1b ...
#
# A run that is asked to stop (SIGUSR1 or SIGTERM to its processes) saves; started again, it resumes.
set -eu
cd "$(dirname "$0")/../.."
processes=${PROCESSES_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$processes" pretrain.py "$@"
