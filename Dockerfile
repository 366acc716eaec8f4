# Two images:
#
#   docker build --target gpu  -t megatron_mup .        # NVIDIA's PyTorch, with Transformer Engine and Apex
#   docker build --target slim -t megatron_mup:slim .   # python:slim with PyTorch for CPUs (or TORCH_INDEX's)
#
# docs/cluster.md says how to run them; GPUs want --ipc=host.

# A release with PyTorch 2.11 or newer; the build ends where it is older.
ARG NVIDIA_PYTORCH=26.04-py3
ARG PYTHON=3.12

FROM nvcr.io/nvidia/pytorch:${NVIDIA_PYTORCH} AS gpu
WORKDIR /opt/megatron_mup
COPY pyproject.toml README.md LICENSE ./
COPY megatron_mup megatron_mup
COPY tools tools
COPY examples examples
COPY pretrain.py ./
# All that the project needs but PyTorch: NVIDIA's build is there, under a version that pip takes for older than its own.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; x = p['optional-dependencies']; \
print('\n'.join(d for d in [*p['dependencies'], *x['data'], *x['prometheus'], *x['wandb']] if not d.startswith('torch')))" \
        > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && pip install --no-cache-dir --no-deps --editable . \
    && rm /tmp/requirements.txt \
    && python -c "import sys; from megatron_mup.planning.findings import healthy; \
from megatron_mup.planning.machine import check_python; f = check_python(); print(f[0].text); sys.exit(not healthy(f))" \
    && useradd --create-home --uid 10001 trainer
USER 10001
WORKDIR /home/trainer
ENV OMP_NUM_THREADS=1
HEALTHCHECK --interval=5m --timeout=2m CMD ["python", "/opt/megatron_mup/tools/doctor.py", "--quick"]
CMD ["python", "/opt/megatron_mup/pretrain.py", "--help"]

FROM python:${PYTHON}-slim AS slim
# Wheels of PyTorch: for CPUs; with https://download.pytorch.org/whl/cu130 for GPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=2.13.0
WORKDIR /opt/megatron_mup
COPY pyproject.toml README.md LICENSE ./
COPY megatron_mup megatron_mup
COPY tools tools
COPY examples examples
COPY pretrain.py ./
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==${TORCH}" \
    && pip install --no-cache-dir --editable ".[data,prometheus,wandb]" \
    && useradd --create-home --uid 10001 trainer
USER 10001
WORKDIR /home/trainer
ENV OMP_NUM_THREADS=1
HEALTHCHECK --interval=5m --timeout=2m CMD ["python", "/opt/megatron_mup/tools/doctor.py", "--quick"]
CMD ["python", "/opt/megatron_mup/pretrain.py", "--help"]
