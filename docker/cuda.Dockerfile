# What: syncnorm with torch's CUDA build, the whole command line and the examples; ranks talk over NCCL.
# When: to train on NVIDIA GPUs; the host needs the driver and the NVIDIA Container Toolkit, the image brings CUDA.
# How:  docker build -f docker/cuda.Dockerfile -t syncnorm:cuda . && docker run --rm --gpus all --shm-size 1g syncnorm:cuda
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${BASE_IMAGE} AS dependencies
# pip's own settings, for builds behind a mirror. They stay in this stage: the image's history does not show them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# Alone and first, so that no other package brings another torch. PyPI's wheel for Linux is the CUDA build, with
# CUDA's libraries as packages: an NVIDIA base image would hold them a second time.
RUN pip install -c constraints.txt torch \
    && python -c 'import sys, torch; sys.exit(not torch.version.cuda and "got a CPU build of torch: point PIP_INDEX_URL at an index with the CUDA build")'
# With an empty package in syncnorm's place, so that its own changes leave this layer, the large one, as it is.
ARG EXTRA=compare
COPY pyproject.toml hatch_build.py ./
RUN mkdir syncnorm && echo '__version__ = "0"' > syncnorm/__init__.py && touch README.md LICENSE \
    && pip install -c constraints.txt ".[${EXTRA}]" \
    && pip uninstall -q -y syncnorm

FROM dependencies AS package
# The compiler of the native code, which makes the layer faster on CPUs. Without one the wheel is pure Python.
# hadolint ignore=DL3008
RUN (apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*) \
    || echo "no compiler: syncnorm without its native code"
COPY . ./
RUN pip wheel -q --no-deps --wheel-dir /dist .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="syncnorm" \
      org.opencontainers.image.description="Synchronized batch normalization for PyTorch, on NVIDIA GPUs with NCCL" \
      org.opencontainers.image.licenses="BSD-3-Clause"
# Triton and torch.compile build their launchers at run time. The distribution's compiler has no version here because
# its archive keeps the newest one only: a pin would break the build at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# A user with a home: Triton, torch and matplotlib keep caches there, and ask for the user's name.
RUN useradd --uid 1000 --create-home syncnorm && install -d -o syncnorm -g syncnorm /workspace /workspace/checkpoints
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Copied, not mounted: older builders do not see that a mounted wheel has changed, and keep the layer.
COPY --from=package /dist /dist
RUN pip install --no-cache-dir --no-index --no-deps /dist/*.whl
WORKDIR /workspace
COPY examples examples
USER 1000:1000
# Under a launcher the self-test takes the GPUs; alone it would start gloo ranks on the CPU.
CMD ["torchrun", "--standalone", "--nproc-per-node", "gpu", "-m", "syncnorm", "selftest"]
