# torch with its libraries, in one layer that the trainer and the CPU engine share.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
COPY constraints.txt /opt/constraints.txt
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet /opt/venv && uv pip install --quiet --python /opt/venv --compile-bytecode --constraints /opt/constraints.txt torch
