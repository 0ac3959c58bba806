// The live page: what the address asks for, what the server says, and who gets to hear of it.
//
// Messages only change what is known; the page is drawn once per frame at most, however many came.

import { Announcer } from "./announcer.js";
import { Ranking } from "./board.js";
import { Chart } from "./chart.js";
import { Connection } from "./connection.js";
import { Pins } from "./pins.js";

const LIMITS = ["10", "25", "50", "100"];
const SECOND_MS = 1000;
const LATE_MS = 1000; // a second that took this much longer: messages waited, too
const TELL_LAGGING_MS = 5000;
const DRAW_SHARE = 0.5; // of the time: a slow machine draws less often, and still moves what it drew
const WORDS = {
  connecting: "Connecting",
  live: "Live",
  delayed: "Delayed",
  lagging: "Lagging",
  reconnecting: "Reconnecting",
  closed: "Closed",
};

const element = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat();

const boards = document.querySelector('meta[name="boards"]').content.split(",");
const address = new URLSearchParams(location.search);
const wish = {
  board: [address.get("board"), "main"].find((board) => boards.includes(board)) ?? boards[0],
  limit: LIMITS.includes(address.get("limit")) ? address.get("limit") : LIMITS[0],
};

const announcer = new Announcer(element("announcer"));
const ranking = new Ranking(element("ranking"), element("empty"), (player) => pins.toggle(player));
const pins = new Pins(element("pins"), element("no-pins"), {
  added: (player) => connection.follow([player]),
  removed: (player) => connection.unfollow([player]),
  changed: draw,
});
const rate = new Chart(element("rate"), (value) => numbers.format(Math.round(value)));
const delay = new Chart(element("delay"), (value) => `${numbers.format(value)} ms`);

let top = null; // the list as last sent; null before the first one of this board
let isDue = false; // something has changed since it was last drawn
let isDrawing = false; // a frame is being waited for, or drawn
let restUntil = 0; // when the next frame may be drawn
let isNew = true; // what comes was not seen to change: another board, or nobody looked
let updates = 0; // since the last second began
let slowest = null; // delay of the slowest list since then, in ms
let secondBegan = performance.now();
let laggingUntil = 0;

const connection = new Connection({
  query: () => ({ board: wish.board, limit: wish.limit, scores: "all" }),
  players: () => pins.players,
  state: show,
  message: {
    leaderboardUpdate({ topScores, delayMs, resync }) {
      top = topScores;
      if (delayMs !== undefined) slowest = Math.max(slowest ?? 0, delayMs);
      if (resync) tellLagging();
      draw();
    },
    scoreUpdate({ playerId, newScore }) {
      updates += 1;
      if (pins.learn(playerId, newScore)) draw();
    },
    scoreUpdatesSkipped({ count }) {
      updates += count;
    },
  },
});

function draw() {
  isDue = true;
  if (isDrawing) return;
  isDrawing = true;
  const waitMs = restUntil - performance.now();
  if (waitMs > 0) setTimeout(() => requestAnimationFrame(drawFrame), waitMs);
  else requestAnimationFrame(drawFrame);
}

function drawFrame() {
  const beganAt = performance.now();
  isDue = false;
  drawNow();
  // Runs when the browser has laid out and painted what was drawn.
  setTimeout(() => {
    restUntil = beganAt + (performance.now() - beganAt) / DRAW_SHARE;
    isDrawing = false;
    if (isDue) draw();
  });
}

function drawNow() {
  pins.show(top ?? [], top !== null, (sentence) => announcer.say(sentence));
  if (top === null) {
    ranking.clear();
    return;
  }
  if (!isNew) announceLeader(ranking.leader, top[0]);
  ranking.show(top, pins.players, !isNew);
  isNew = false;
}

function announceLeader(before, leader) {
  if (before !== undefined && leader && before !== leader.playerId) {
    announcer.say(`${leader.playerId} leads with ${numbers.format(leader.score)}`, 1);
  }
}

function tellLagging() {
  laggingUntil = performance.now() + TELL_LAGGING_MS;
  connection.tell();
}

function show(state, detail) {
  const shown = state === "live" && performance.now() < laggingUntil ? "lagging" : state;
  document.body.dataset.state = shown;
  // What changes is read out: why it is closed or late belongs there, but nobody wants to hear a countdown.
  put("state", detail && shown !== "reconnecting" ? `${WORDS[shown]}: ${detail}` : WORDS[shown]);
  put("countdown", shown === "reconnecting" ? detail : "");
}

function put(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

function eachSecond() {
  const now = performance.now();
  const tookMs = now - secondBegan;
  secondBegan = now;
  if (tookMs > SECOND_MS + LATE_MS && !document.hidden) tellLagging();
  rate.add(connection.isConnected ? (updates * SECOND_MS) / tookMs : null);
  delay.add(connection.isConnected ? slowest : null);
  updates = 0;
  slowest = null;
  connection.tell();
}

function choose(name, value) {
  wish[name] = value;
  address.set(name, value);
  history.replaceState(null, "", `?${address}`);
  isNew = true;
  if (name === "board") {
    top = null;
    pins.forBoard(value);
    document.title = title();
  }
  connection.restart();
}

function title() {
  return boards.length > 1 ? `${wish.board} · Scoreboard` : "Scoreboard";
}

function find(player) {
  const ranks = ranking.find(player);
  const last = ranks.at(-1);
  const places = ranks.length > 1 ? `Ranks ${ranks.slice(0, -1).join(", ")} and ${last}` : `Rank ${last}`;
  element("found").textContent = ranks.length ? places : `Not among the first ${wish.limit}`;
  element("pin").textContent = `Pin “${player}”`;
  element("answer").hidden = player === "";
}

element("limit").value = wish.limit;
element("limit").addEventListener("change", ({ target }) => choose("limit", target.value));
element("board").hidden = boards.length < 2;
element("board").append(...boards.map((name) => new Option(name)));
element("board").value = wish.board;
element("board").addEventListener("change", ({ target }) => choose("board", target.value));

element("name").addEventListener("input", ({ target }) => find(target.value));
element("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const player = element("name").value;
  const refusal = player && pins.add(player);
  if (refusal) {
    element("found").textContent = refusal;
    return;
  }
  if (document.activeElement === element("pin")) element("name").focus(); // the button is about to go
  element("name").value = "";
  find("");
});

document.addEventListener("visibilitychange", () => {
  // In a hidden tab no frame is drawn and seconds are long: neither says anything of the connection.
  isNew = true;
  secondBegan = performance.now();
  updates = 0;
});

document.title = title();
pins.forBoard(wish.board);
connection.start();
setInterval(eachSecond, SECOND_MS);
