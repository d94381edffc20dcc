# kvdistill on CUDA: docker build -t kvdistill .
# torch is the base image's; another one: --build-arg BASE=pytorch/pytorch:TAG
ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime

FROM ${BASE} AS build
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kvdistill kvdistill
RUN python -m pip wheel --no-deps --wheel-dir /dist .

FROM ${BASE}
ARG EXTRAS=buckets,datasets,gguf,harness,lora,parquet
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
COPY --from=build /dist /dist
# Triton compiles with gcc and Python's headers; the constraint keeps the base image's torch.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -c "from importlib.metadata import version; print('torch==' + version('torch'))" \
        > /dist/constraints.txt \
    && python -m pip install --constraint /dist/constraints.txt "$(echo /dist/*.whl)[${EXTRAS}]" \
    && mkdir -p /home/kvdistill /work \
    && chmod 1777 /home/kvdistill /work

# Any user: `docker run --user "$(id -u):$(id -g)"` names one without an entry in /etc/passwd.
ENV HOME=/home/kvdistill USER=kvdistill
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["kvdistill"]
CMD ["--help"]
