# One container: server, relay and persister. compose.yaml shows it with everything it needs; the root may be read-only.
#
#   docker build -t scoreboard --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker buildx build --platform linux/amd64,linux/arm64 …   for both processors
#   docker run --read-only -p 8080:8080 -e JWT_SECRET -e REDIS_HOST=… -e KAFKA_BROKERS=… -e DATABASE_URL=… scoreboard

# An exact version, since a tag without one moves. Who wants the very bytes pins the digest, which
# `docker buildx imagetools inspect python:3.13.9-slim-bookworm` prints: …bookworm@sha256:…
ARG BASE=python:3.13.9-slim-bookworm


# hadolint ignore=DL3006
FROM ${BASE} AS build

WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# Without pip: what this environment holds is what the image gets.
RUN python -m venv --without-pip /opt/scoreboard

# The dependencies first: this layer stays as long as they do.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && python -m pip --python /opt/scoreboard/bin/python install -c constraints.txt -r requirements.txt

COPY README.md hatch_build.py ./
COPY server server
COPY sync sync
# This compiles server/uws_*.c: there is no compiler here, so pip fetches Zig's for it, and lets it go again.
# Out goes what only other systems load, what only a compiler reads, and setuptools, which socketify asks for and never
# imports. The .pyc files stay: 9 MB, and without them each start takes half a second longer.
RUN python -m pip --python /opt/scoreboard/bin/python install --no-deps . \
    && python -m pip --python /opt/scoreboard/bin/python uninstall -y setuptools \
    && find /opt/scoreboard -name '*darwin*.so' -delete -o -name '*.dll' -delete -o -name '*.py[xi]' -delete \
        -o -name '*.pxd' -delete -o -name '*.[ch]' -delete \
    && find /opt/scoreboard -depth -type d -name tests -exec rm -r {} +



# hadolint ignore=DL3006
FROM ${BASE}

# On x86-64, socketify's library is linked to the system's libuv; its version is that of the base's Debian. Nothing is
# installed from here on, so the base's pip goes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libuv1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 10001 scoreboard \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin scoreboard \
    && python -m pip uninstall -y --no-cache-dir pip \
    && rm -rf "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')"

COPY --from=build /opt/scoreboard /opt/scoreboard

ENV PATH=/opt/scoreboard/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=8080 \
    METRICS_HOST=0.0.0.0 \
    RELAY_METRICS_PORT=9101 \
    PERSISTER_METRICS_PORT=9102

USER 10001:10001
WORKDIR /srv
# The server with its own metrics; the relay's metrics; the persister's.
EXPOSE 8080 9101 9102
STOPSIGNAL SIGTERM

# Of the server's processes alone: an orchestrator that restarts what is unhealthy must not end a server that is well for
# a persister that cannot work. `scoreboard health`, metrics and log tell of that one.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 CMD ["scoreboard", "health", "--server"]

CMD ["scoreboard", "all"]

ARG REVISION=unknown
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="scoreboard" \
      org.opencontainers.image.description="A real-time scoreboard service: uWebSockets, Redis, Kafka, TimescaleDB" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.13.9-slim-bookworm"
