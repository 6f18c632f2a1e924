# What: syncnorm with torch's CPU build, the whole command line and the examples; ranks talk over gloo.
# When: to try distributed batch norm, or test your own, without GPUs; compose.yaml makes two nodes of it.
# How:  docker build -f docker/cpu.Dockerfile -t syncnorm:cpu . && docker run --rm syncnorm:cpu
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${BASE_IMAGE} AS dependencies
# pip's own settings, for builds behind a mirror. They stay in this stage: the image's history does not show them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# Alone and first, so that no other package brings another torch. A mirror may lack the CPU build, and pip would
# quietly take the one for CUDA, ten times as large: better to stop here.
RUN pip install -c constraints.txt torch \
    && python -c 'import sys, torch; sys.exit(torch.version.cuda and "got a CUDA build of torch: set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to the CPU build")'
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
      org.opencontainers.image.description="Synchronized batch normalization for PyTorch, on the CPU with gloo" \
      org.opencontainers.image.licenses="BSD-3-Clause"
# A user with a home: torch and matplotlib keep caches there, and ask for the user's name.
RUN useradd --uid 1000 --create-home syncnorm && install -d -o syncnorm -g syncnorm /workspace /workspace/checkpoints
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Copied, not mounted: older builders do not see that a mounted wheel has changed, and keep the layer.
COPY --from=package /dist /dist
RUN pip install --no-cache-dir --no-index --no-deps /dist/*.whl
WORKDIR /workspace
COPY examples examples
USER 1000:1000
CMD ["syncnorm", "selftest"]
