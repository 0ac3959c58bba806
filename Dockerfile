# One container, server and sync: docker run -p 8080:8080 -e JWT_SECRET -e REDIS_HOST=… -e KAFKA_BROKERS=… -e DATABASE_URL=… scoreboard

FROM python:3.13-slim-bookworm AS build

WORKDIR /build
RUN python -m venv /opt/scoreboard
ENV PATH=/opt/scoreboard/bin:$PATH

# The dependencies first: this layer stays as long as they do.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt

COPY README.md ./
COPY server server
COPY sync sync
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps .


FROM python:3.13-slim-bookworm

# socketify's library is linked to the system's libuv.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libuv1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin scoreboard

COPY --from=build /opt/scoreboard /opt/scoreboard

ENV PATH=/opt/scoreboard/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8080

USER 10001
WORKDIR /srv
EXPOSE 8080
STOPSIGNAL SIGTERM

HEALTHCHECK --interval=10s --timeout=3s --start-period=15s \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/healthz\", timeout=2)"]

CMD ["scoreboard", "all"]
