// The live page: what the address asks for, what the server says, and who gets to hear of it.
//
// Messages only change what is known; the page is drawn once per frame, however many came.

import { Announcer } from "./announcer.js";
import { Chart } from "./chart.js";
import { Connection } from "./connection.js";
import { Pins } from "./pins.js";
import { Ranking } from "./board.js";
import { chooseTheme } from "./theme.js";

const LIMITS = ["10", "25", "50", "100"];
const LATE_MS = 1000; // a message that waited this long for its frame was shown late
const TELL_LATE_MS = 5000;

const element = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat();

const boards = document.querySelector('meta[name="boards"]').content.split(",").filter(Boolean);
const address = new URLSearchParams(location.search);
const wish = {
  board: boards.includes(address.get("board")) ? address.get("board") : boards.includes("main") ? "main" : boards[0],
  limit: LIMITS.includes(address.get("limit")) ? address.get("limit") : "10",
};

const announcer = new Announcer(element("announcer"));
const ranking = new Ranking(element("ranking"), element("empty"), (player) => pins.toggle(player));
const pins = new Pins(element("pins"), {
  added: (player) => connection.follow([player]),
  removed: (player) => connection.unfollow([player]),
  changed: () => draw(),
});
const rate = new Chart(element("rate"), (value) => numbers.format(value));
const delay = new Chart(element("delay"), (value) => `${numbers.format(value)} ms`);

let top = []; // the list as last sent
let isNew = true; // nothing was shown of this board yet, so nothing changed either
let updates = 0; // since the last second began
let slowest = null; // delay of the slowest list since then, in ms
let dueSince = null; // when the frame to come was asked for
let lateUntil = 0;

const connection = new Connection({
  path: () => {
    const query = new URLSearchParams({ ...(wish.board && { board: wish.board }), limit: wish.limit });
    if (pins.players.length) query.set("players", pins.players.join(","));
    return `/live-updates?${query}`;
  },
  state: show,
  message: {
    leaderboardUpdate({ topScores, delayMs, resync }) {
      top = topScores;
      if (delayMs !== undefined) slowest = Math.max(slowest ?? 0, delayMs);
      if (resync) tellLate();
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
  if (dueSince !== null) return;
  dueSince = performance.now();
  requestAnimationFrame((now) => {
    if (now - dueSince > LATE_MS && !document.hidden) tellLate();
    dueSince = null;
    if (!isNew) announceLeader(ranking.leader, top[0]);
    ranking.show(top, pins.players, !isNew && !document.hidden);
    pins.show(top, (text) => announcer.say(text));
    isNew = false;
  });
}

function announceLeader(before, leader) {
  if (before && leader && before !== leader.playerId) {
    announcer.say(`${leader.playerId} leads with ${numbers.format(leader.score)}`);
  }
}

function tellLate() {
  lateUntil = performance.now() + TELL_LATE_MS;
  connection.tell();
}

function show(state, detail = "") {
  const shown = state === "live" && performance.now() < lateUntil ? "lagging" : state;
  const word = WORDS[shown];
  document.body.dataset.state = shown;
  // Whoever listens hears a change of the state, but no countdown.
  if (element("state-word").textContent !== word) element("state-word").textContent = word;
  element("state-detail").textContent = detail;
}

const WORDS = {
  connecting: "Connecting",
  live: "Live",
  delayed: "Delayed",
  lagging: "Lagging",
  reconnecting: "Reconnecting",
  closed: "Closed",
};

function choose(name, value) {
  wish[name] = value;
  address.set(name, value);
  history.replaceState(null, "", `?${address}`);
  isNew = true;
  pins.forBoard(wish.board);
  connection.restart();
}

element("limit").value = wish.limit;
element("limit").addEventListener("change", ({ target }) => choose("limit", target.value));
element("board-chooser").hidden = boards.length < 2;
element("board-name").append(...boards.map((name) => new Option(name)));
element("board-name").value = wish.board;
element("board-name").addEventListener("change", ({ target }) => choose("board", target.value));

element("name").addEventListener("input", ({ target }) => find(target.value));
element("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const player = element("name").value;
  if (!player) return;
  const refusal = pins.add(player);
  element("found").textContent = refusal ?? `${player} is pinned`;
  if (refusal) return;
  element("name").value = "";
  ranking.find("");
});

function find(text) {
  const found = ranking.find(text);
  element("found").textContent = text ? `${found} in this list. Enter pins exactly this name.` : "";
}

setInterval(() => {
  const isConnected = ["live", "lagging", "delayed"].includes(document.body.dataset.state);
  rate.add(isConnected ? updates : null);
  delay.add(isConnected ? slowest : null);
  updates = 0;
  slowest = null;
  connection.tell();
}, 1000);

chooseTheme(element("theme"));
pins.forBoard(wish.board);
connection.start();
