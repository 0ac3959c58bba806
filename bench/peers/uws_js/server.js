// The scoreboard's duty in uWebSockets.js, ioredis and kafkajs. How it is tuned and what it leaves out: ../README.md.
'use strict'

const crypto = require('node:crypto')
const fs = require('node:fs')
const path = require('node:path')
const Redis = require('ioredis')
const jwt = require('jsonwebtoken')
const uws = require('@rjweb/uws')
const { Kafka, logLevel } = require('kafkajs')

const env = process.env
// A key and not text: jsonwebtoken would first try, for each token, whether the text is a public key.
const SECRET = crypto.createSecretKey(Buffer.from(env.JWT_SECRET))
const PREFIX = env.KEY_PREFIX || 'uws'
const TOPIC = env.KAFKA_TOPIC
const RATE = Number(env.RATE_LIMIT_PER_SECOND || 10)
const INTERVAL_US = RATE ? Math.round(1e6 / RATE) : 0
const WINDOW_US = INTERVAL_US * Number(env.RATE_LIMIT_BURST || 20)
const BATCH_MS = 10
const MAX_TOKENS = 65536
const MAX_BODY_BYTES = 16384
const BOARD = `${PREFIX}:leaderboard`

const redis = new Redis({
  host: env.REDIS_HOST || '127.0.0.1',
  port: Number(env.REDIS_PORT || 6379),
  enableAutoPipelining: true,
  scripts: {
    applyUpdate: { lua: fs.readFileSync(path.join(__dirname, '../apply_update.lua'), 'utf8'), numberOfKeys: 3 },
  },
})
const kafka = new Kafka({ clientId: 'uws', brokers: env.KAFKA_BROKERS.split(','), logLevel: logLevel.ERROR })
const producer = kafka.producer({ allowAutoTopicCreation: false })

// Kafka: what was accepted within BATCH_MS goes out in one request, and one request is under way at a time.
let pending = []
let sending = false

function publish(event) {
  pending.push(event)
  if (!sending) {
    sending = true
    setTimeout(flush, BATCH_MS)
  }
}

async function flush() {
  const messages = pending
  pending = []
  try {
    await producer.send({ topic: TOPIC, messages })
  } catch (error) {
    console.error(`${messages.length} events lost: ${error.message}`)
  }
  if (pending.length) setTimeout(flush, BATCH_MS)
  else sending = false
}

// Tokens: verified once, then known by the header's text until they expire.
const callers = new Map()

function callerOf(authorization) {
  let caller = callers.get(authorization)
  if (caller === undefined) {
    if (!authorization.startsWith('Bearer ')) return null
    try {
      const claims = jwt.verify(authorization.slice(7), SECRET, { algorithms: ['HS256'] })
      if (typeof claims.sub !== 'string' || typeof claims.exp !== 'number') return null
      caller = { subject: claims.sub, expiresMs: claims.exp * 1000, limitKey: `${PREFIX}:limit:${claims.sub}` }
    } catch {
      return null
    }
    if (callers.size >= MAX_TOKENS) callers.delete(callers.keys().next().value)
    callers.set(authorization, caller)
  }
  if (caller.expiresMs <= Date.now()) {
    callers.delete(authorization)
    return null
  }
  return caller
}

function answer(res, status, body, header, value) {
  if (res.gone) return
  res.cork(() => {
    if (status !== '200 OK') res.writeStatus(status)
    res.writeHeader('Content-Type', 'application/json')
    if (header) res.writeHeader(header, value)
    res.end(body)
  })
}

function refuse(res, status, detail) {
  answer(res, status, JSON.stringify({ detail }))
}

async function applyUpdate(res, caller, body) {
  let update
  try {
    update = JSON.parse(body)
  } catch {
    return refuse(res, '400 Bad Request', 'expected JSON')
  }
  const { playerId, scoreDelta } = update || {}
  if (typeof playerId !== 'string' || !playerId || playerId.length > 128 || !Number.isSafeInteger(scoreDelta)) {
    return refuse(res, '400 Bad Request', 'expected playerId and scoreDelta')
  }
  if (caller.subject !== playerId) return refuse(res, '403 Forbidden', 'not your score')
  const key = `${PREFIX}:score:${playerId}`
  let applied
  try {
    applied = await redis.applyUpdate(caller.limitKey, key, BOARD, playerId, scoreDelta, INTERVAL_US, WINDOW_US)
  } catch (error) {
    console.error(error.message)
    return refuse(res, '503 Service Unavailable', 'Redis failed')
  }
  const [accepted, newScore] = applied
  if (!accepted) {
    const seconds = String(Math.ceil(newScore / 1e6))
    return answer(res, '429 Too Many Requests', '{"detail":"slow down"}', 'Retry-After', seconds)
  }
  const player = JSON.stringify(playerId)
  const event = `{"playerId":${player},"scoreDelta":${scoreDelta},"newScore":${newScore},"at":${Date.now()}}`
  publish({ key: playerId, value: event })
  answer(res, '200 OK', `{"playerId":${player},"newScore":${newScore}}`)
}

// One read of Redis is shared by all who ask while it is under way, and so is its text.
const reads = new Map()

function board(limit) {
  let read = reads.get(limit)
  if (read === undefined) {
    read = redis.zrevrange(BOARD, 0, limit - 1, 'WITHSCORES').then((reply) => {
      const entries = []
      for (let i = 0; i < reply.length; i += 2) entries.push({ playerId: reply[i], score: Number(reply[i + 1]) })
      return JSON.stringify(entries)
    })
    reads.set(limit, read)
    const done = () => reads.delete(limit)
    read.then(done, done)
  }
  return read
}

const app = uws.App()

app.post('/update-score', (res, req) => {
  const caller = callerOf(req.getHeader('authorization'))
  res.onAborted(() => { res.gone = true })
  let parts = null
  let size = 0
  res.onData((chunk, isLast) => {
    size += chunk.byteLength
    if (size > MAX_BODY_BYTES) {
      parts = null
      if (isLast) refuse(res, '413 Payload Too Large', 'too large')
      return
    }
    if (!isLast) {
      const copy = Buffer.from(Buffer.from(chunk)) // uWebSockets takes the chunk back
      parts = parts ? Buffer.concat([parts, copy]) : copy
      return
    }
    const last = Buffer.from(chunk)
    const body = (parts ? Buffer.concat([parts, last]) : last).toString()
    if (caller === null) answer(res, '401 Unauthorized', '{"detail":"no valid token"}', 'WWW-Authenticate', 'Bearer')
    else applyUpdate(res, caller, body)
  })
})

app.get('/leaderboard', (res, req) => {
  const limit = Number(req.getQuery('limit') || 10)
  res.onAborted(() => { res.gone = true })
  if (!Number.isInteger(limit) || limit < 1 || limit > 1000) return refuse(res, '400 Bad Request', 'limit: 1 to 1000')
  board(limit).then(
    (body) => answer(res, '200 OK', body),
    () => refuse(res, '503 Service Unavailable', 'Redis failed'),
  )
})

app.get('/healthz', (res) => { res.end('ok') })

async function main() {
  await producer.connect()
  await redis.ping()
  app.listen(env.HOST || '127.0.0.1', Number(env.PORT || 8080), (socket) => {
    if (!socket) process.exit(1)
    console.log('listening')
  })
}

process.on('SIGTERM', async () => {
  await producer.disconnect()
  process.exit(0)
})

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
