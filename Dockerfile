# The service without its development tools: no embedded PostgreSQL, no compiler, nothing that was not hash-checked.
#
#   docker build --tag onetime .
#   docker run --rm --env-file onetime.env --volume ./keys:/etc/onetime:ro onetime migrate
#   docker run --read-only --cap-drop ALL --env-file onetime.env --volume ./keys:/etc/onetime:ro \
#     --publish 50051:50051 onetime
#
# It writes no file, so the root file system may be read-only. The files that onetime.env names (keys, policy, certificate)
# lie in the volume, and are read again when they change. Where callers show certificates, set ONETIME_HEALTH_LISTEN for the
# health check below. For one backend alone: `--network container:backend onetime serve --insecure-loopback`.
#
# The base image is pinned by tag and digest: the index, for all platforms, of October 2026. The digest is the one that
# public projects pin for this tag; it could not be pulled where this was written. To renew it:
#   docker buildx imagetools inspect python:3.13-slim-trixie
ARG PYTHON_IMAGE=python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c

FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/build.txt requirements/serve.txt requirements/
RUN python -m pip install --require-hashes --only-binary :all: --requirement requirements/build.txt \
    && python -m venv --without-pip /opt/onetime \
    && python -m pip --python /opt/onetime/bin/python install --no-compile --require-hashes --only-binary :all: \
        --requirement requirements/serve.txt
COPY pyproject.toml README.md ./
COPY generated/ generated/
COPY service/ service/
# Bytecode that never looks at its source again: nothing is written at run time, and the build is the same each time.
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && python -m pip --python /opt/onetime/bin/python install --no-compile --no-deps /wheels/onetime-*.whl \
    && /opt/onetime/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/onetime/lib

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="onetime" \
      org.opencontainers.image.description="One-time tokens and email verification codes over gRPC, with their state in PostgreSQL"
RUN groupadd --gid 10001 onetime \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin onetime
COPY --from=builder /opt/onetime /opt/onetime
ENV PATH=/opt/onetime/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /
USER 10001:10001
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["onetime", "health"]
ENTRYPOINT ["onetime"]
CMD ["serve"]
