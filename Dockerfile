# One image for every part of the stack; compose and Kubernetes say which command it runs.
#
#   docker build --target cpu -t headwater:cpu .
#   docker build --target gpu -t headwater:gpu .     # on vLLM's own CUDA image
#
# Other package indexes: --build-arg PIP_INDEX_URL=..., PIP_FIND_LINKS=..., PIP_TRUSTED_HOST=..., TORCH_INDEX_URL=...
#
# checkov:skip=CKV_DOCKER_2: what is healthy depends on the part: compose and Kubernetes say it
# checkov:skip=CKV_DOCKER_7: the tags stand in the ARGs below
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# The vLLM that the engine is written for; newer ones change its API.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0

# What is installed, without the code: only these three files can spoil the layer of dependencies.
FROM scratch AS requirements
COPY pyproject.toml constraints.txt LICENSE /

# The code, and the folders that volumes are mounted on: a new named volume takes over their owner.
FROM ${PYTHON_IMAGE} AS tree
RUN install -d -o 10001 -g 10001 /headwater/runs /headwater/weights /headwater/documents /headwater/huggingface \
    && install -d /headwater/config/prompts
WORKDIR /headwater
COPY shared shared
COPY services services
COPY trainer trainer
COPY evaluation evaluation
COPY starter starter
COPY cli cli
# A checkout may be for its owner's eyes only (umask 077); the image's user is another.
RUN chmod -R a+rX .

FROM ${PYTHON_IMAGE} AS cpu
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST
# PyTorch's own index has builds without CUDA: 200 MB instead of several GB. Empty: torch comes from PIP_INDEX_URL.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# A layer of its own, which changes seldom; without its test programs and without headers for a compiler that isn't here.
RUN --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/headwater \
    && /opt/headwater/bin/pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
        "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' /tmp/constraints.txt)" \
    && rm -r /opt/headwater/lib/python3*/site-packages/torch/test /opt/headwater/lib/python3*/site-packages/torch/include
# pyproject.toml without the packages that it names: their requirements and the `headwater` script. The extras: what a run
# or `headwater report` may need. (The Docker SDK is for the machine outside, wandb for those who have an account.)
RUN --mount=type=bind,from=requirements,target=/requirements,rw --mount=type=cache,target=/root/.cache/pip \
    cd /requirements && touch README.md && /opt/headwater/bin/pip install -c constraints.txt '.[huggingface,report,s3,tensorboard]'
COPY --from=tree /headwater /headwater
ENV PATH=/opt/headwater/bin:$PATH PYTHONPATH=/headwater PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp LOGNAME=headwater MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/headwater/huggingface TOKENIZERS_PARALLELISM=false
RUN python -m compileall -q /headwater
WORKDIR /headwater
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["headwater", "--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Headwater" \
      org.opencontainers.image.description="Self-improving pretraining as a service stack, for CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# The image brings torch, transformers and vLLM. The environment on top sees them and adds what is missing; what the image
# has stays at the image's versions, and a requirement that doesn't fit fails here. (A pip of its own would bring its own
# setuptools, which hides the image's.)
FROM ${VLLM_IMAGE} AS gpu
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST
RUN --mount=type=bind,from=requirements,target=/requirements,rw --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip --system-site-packages /opt/headwater \
    && cd /requirements && touch README.md && /opt/headwater/bin/python -m pip list --format=freeze > installed.txt \
    && /opt/headwater/bin/python -m pip install -c installed.txt '.[huggingface,report,s3,tensorboard]'
COPY --from=tree /headwater /headwater
ENV PATH=/opt/headwater/bin:$PATH PYTHONPATH=/headwater PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp LOGNAME=headwater MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/headwater/huggingface TOKENIZERS_PARALLELISM=false \
    XDG_CACHE_HOME=/headwater/cache VLLM_NO_USAGE_STATS=1
RUN install -d -o 10001 -g 10001 /headwater/cache && python -m compileall -q /headwater
WORKDIR /headwater
USER 10001:10001
STOPSIGNAL SIGTERM
# The base's own is `vllm serve`.
ENTRYPOINT []
CMD ["headwater", "--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Headwater" \
      org.opencontainers.image.description="Self-improving pretraining as a service stack, for GPUs, with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
