# The service as an unprivileged user, offline, with nothing secret inside. See docs/deploy.md.
#
#   docker build -t mmedrag .                                  (CPU; GPU: see TORCH_INDEX)
#
# Stage 1 builds the wheel and a virtual environment, stage 2 holds only that environment.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
# The usual torch brings CUDA; this index has the CPU build of the same version, a tenth of the
# size, which pip prefers where it sees both. For a GPU: --build-arg TORCH_INDEX=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,dicom
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/mmedrag
# Requirements first, so that a changed source file does not install torch again.
COPY constraints.txt ./
RUN /opt/mmedrag/bin/pip install -c constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN /opt/mmedrag/bin/pip install -c constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="mmedrag" \
      org.opencontainers.image.description="Research software, not a medical device" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/mmedrag/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    MMEDRAG_CACHE=/var/cache/mmedrag \
    MMEDRAG_API_KEYS=/run/secrets/mmedrag-keys
RUN groupadd --gid 10001 mmedrag \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
       --shell /usr/sbin/nologin mmedrag \
    && install -d -o mmedrag -g mmedrag -m 0700 /var/cache/mmedrag /var/lib/mmedrag
COPY --from=build /opt/mmedrag /opt/mmedrag
USER 10001:10001
WORKDIR /var/lib/mmedrag
VOLUME ["/var/cache/mmedrag", "/var/lib/mmedrag"]
EXPOSE 8000
# Alive, not ready: a full queue or a full disk is no reason to be killed. The first start of the
# embedded system builds its indexes.
HEALTHCHECK --interval=30s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["mmedrag", "serve", "start", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--audit", "/var/lib/mmedrag/audit.jsonl"]
