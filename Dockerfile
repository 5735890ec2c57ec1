# syntax=docker/dockerfile:1
# hybridzoo with everything that it needs to train, on a CPU:
#
#     docker build -t hybridzoo .
#     docker run --rm --shm-size 8g -v "$PWD/photographs:/data:ro" -v "$PWD/runs:/workspace" \
#         hybridzoo train biformer_tiny --data /data
#
# The container's user has the number 10001 (USER_ID); the folder `runs` must be writable for it.
#
# On NVIDIA GPUs (PyTorch's packages bring CUDA's libraries; the host needs the driver and the container toolkit):
#
#     docker build -t hybridzoo:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu132 .
#     docker run --rm --gpus all --shm-size 8g ... hybridzoo:cuda train ...
ARG BASE=debian:12.9-slim
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=detection,segmentation,export
ARG USER_ID=10001

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    TORCH_HOME=/workspace/.cache/torch \
    HF_HOME=/workspace/.cache/huggingface \
    WANDB_MODE=offline

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV" \
    && useradd --uid "$USER_ID" --create-home --shell /usr/sbin/nologin zoo \
    && install --directory --owner zoo --group zoo /workspace

WORKDIR /opt/hybridzoo

# What changes seldom comes first: PyTorch alone is most of the image.
COPY constraints.txt ./
RUN grep --extended-regexp '^(torch|torchvision)==' constraints.txt > /tmp/torch.txt \
    && python -m pip install --index-url "$TORCH_INDEX" --requirement /tmp/torch.txt \
    && rm /tmp/torch.txt \
    && python -m pip install --constraint constraints.txt "setuptools>=77" wheel

COPY pyproject.toml README.md LICENSE ./
COPY hybridzoo ./hybridzoo
COPY kernels ./kernels
COPY layers ./layers
COPY checkpoints ./checkpoints
COPY backbones ./backbones
COPY configs ./configs
COPY train ./train
# Two builds of OpenCV arrive by dependency; the one without windows must win, the other wants a desktop's libGL.
RUN python -m pip install --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]" \
    && python -m pip install --constraint constraints.txt --no-deps --force-reinstall opencv-python-headless \
    && hybridzoo --help > /dev/null

USER zoo
WORKDIR /workspace
VOLUME ["/workspace"]
ENTRYPOINT ["hybridzoo"]
CMD ["--help"]
