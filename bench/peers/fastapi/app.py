"""The scoreboard's duty in FastAPI, redis.asyncio and confluent-kafka. How it is tuned and what is left out: README.md.

JWT_SECRET=… REDIS_PORT=… KAFKA_BROKERS=… KAFKA_TOPIC=… python -m uvicorn --app-dir bench/peers/fastapi app:app
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, NamedTuple

import jwt
import orjson
import redis.asyncio
from confluent_kafka import KafkaError, Message, Producer
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from pydantic import BaseModel, Field

SECRET = os.environ["JWT_SECRET"].encode()
TOPIC = os.environ["KAFKA_TOPIC"]
PREFIX = os.environ.get("KEY_PREFIX", "fastapi")
BOARD = f"{PREFIX}:leaderboard"
RATE = float(os.environ.get("RATE_LIMIT_PER_SECOND", "10"))
INTERVAL_US = round(1e6 / RATE) if RATE else 0
WINDOW_US = INTERVAL_US * int(os.environ.get("RATE_LIMIT_BURST", "20"))
MAX_SCORE = 2**53 - 1
MAX_TOKENS = 65_536
CONNECTIONS = 64
"""To Redis: 16 were slower, 256 no faster."""

log = logging.getLogger(__name__)


def _report(error: KafkaError | None, message: Message) -> None:
    if error is not None:
        log.error("event lost: %s", error)


pool = redis.asyncio.BlockingConnectionPool(
    host=os.environ.get("REDIS_HOST", "127.0.0.1"),
    port=int(os.environ.get("REDIS_PORT", "6379")),
    max_connections=CONNECTIONS,
)
client = redis.asyncio.Redis(connection_pool=pool)
apply_update = client.register_script((Path(__file__).parent.parent / "apply_update.lua").read_text())
producer = Producer(
    {
        "bootstrap.servers": os.environ["KAFKA_BROKERS"],
        "linger.ms": 10,
        "queue.buffering.max.messages": 1_000_000,
        "delivery.report.only.error": True,
        "on_delivery": _report,
    }
)


async def _serve_reports() -> None:
    while True:
        producer.poll(0)
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Meets Kafka and Redis before the first request, and sends the last events after the last."""
    await client.ping()
    producer.list_topics(TOPIC, timeout=10)
    serving = asyncio.create_task(_serve_reports())
    yield
    serving.cancel()
    producer.flush(10)


app = FastAPI(lifespan=lifespan, openapi_url=None)


class Caller(NamedTuple):
    """Whom a token names, until when."""

    subject: str
    expires_s: float


callers: dict[str, Caller] = {}


async def authenticated(request: Request) -> Caller:
    """The caller; a token is verified once and then known by the header's text."""
    authorization = request.headers.get("authorization", "")
    caller = callers.get(authorization)
    if caller is None:
        scheme, _, token = authorization.partition(" ")
        try:
            claims = jwt.decode(token, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})
        except jwt.PyJWTError as error:
            raise HTTPException(401, "no valid token", {"WWW-Authenticate": scheme or "Bearer"}) from error
        caller = Caller(claims["sub"], claims["exp"])
        if len(callers) >= MAX_TOKENS:
            del callers[next(iter(callers))]
        callers[authorization] = caller
    if caller.expires_s <= time.time():
        callers.pop(authorization, None)
        raise HTTPException(401, "the token has expired", {"WWW-Authenticate": "Bearer"})
    return caller


class Update(BaseModel):
    """What a player asks for."""

    playerId: str = Field(min_length=1, max_length=128)  # noqa: N815 (as it stands in the JSON)
    scoreDelta: int = Field(strict=True, ge=-MAX_SCORE, le=MAX_SCORE)  # noqa: N815


@app.post("/update-score")
async def update_score(update: Update, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """One call of Redis for limit, score and rank; then the event, which is not waited for."""
    player, delta = update.playerId, update.scoreDelta
    if caller.subject != player:
        raise HTTPException(403, "not your score")
    keys = [f"{PREFIX}:limit:{player}", f"{PREFIX}:score:{player}", BOARD]
    accepted, value = await apply_update(keys=keys, args=[player, delta, INTERVAL_US, WINDOW_US])
    if not accepted:
        raise HTTPException(429, "slow down", {"Retry-After": str(-(-value // 1_000_000))})
    event = {"playerId": player, "scoreDelta": delta, "newScore": value, "at": time.time_ns() // 1_000_000}
    producer.produce(TOPIC, key=player, value=orjson.dumps(event))
    return Response(orjson.dumps({"playerId": player, "newScore": value}), media_type="application/json")


reads: dict[int, asyncio.Task[bytes]] = {}


async def read_board(limit: int) -> bytes:
    """The first `limit` players as JSON."""
    try:
        entries = await client.zrevrange(BOARD, 0, limit - 1, withscores=True)
        return orjson.dumps([{"playerId": player.decode(), "score": int(score)} for player, score in entries])
    finally:
        del reads[limit]


@app.get("/leaderboard")
async def leaderboard(limit: Annotated[int, Query(ge=1, le=1000)] = 10) -> Response:
    """One read of Redis is shared by all who ask while it is under way, and so is its text."""
    read = reads.get(limit)
    if read is None:
        read = reads[limit] = asyncio.create_task(read_board(limit))
    return Response(await asyncio.shield(read), media_type="application/json")


@app.get("/healthz")
async def healthz() -> Response:
    """The process is alive."""
    return Response("ok")
