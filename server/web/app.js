// The live board: one WebSocket in, one table out. Player ids come from strangers: they only ever become textContent.
"use strict";

const LIMITS = ["10", "25", "50", "100"];
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;
const STEADY_AFTER_MS = 5_000; // a connection that lived this long resets the delay
const POLICY_VIOLATION = 1008; // the server does not want us back

const board = document.getElementById("board");
const empty = document.getElementById("empty");
const state = document.getElementById("state");
const limitChooser = document.getElementById("limit");

const address = new URLSearchParams(location.search);
const rows = new Map(); // playerId → its row, for those on the board
const numbers = new Intl.NumberFormat();

let socket = null;
let timer = null;
let delayMs = FIRST_DELAY_MS;

function show(word, text = word) {
  state.textContent = text;
  state.dataset.state = document.body.dataset.state = word;
}

function connect() {
  clearTimeout(timer);
  const query = new URLSearchParams({ limit: limitChooser.value, scores: "none" });
  if (address.has("board")) query.set("board", address.get("board"));
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const current = new WebSocket(`${scheme}//${location.host}/live-updates?${query}`);
  let openedAt = null;
  let isLive = true;
  let isFirstList = true;
  socket = current;

  current.onopen = () => {
    openedAt = performance.now();
  };
  current.onmessage = ({ data }) => {
    if (current !== socket) return;
    const message = JSON.parse(data);
    if (message.type === "status") isLive = message.live;
    if (message.type === "leaderboardUpdate") {
      render(message.topScores, !isFirstList);
      isFirstList = false;
    }
    if (!isFirstList) show(isLive ? "live" : "stale");
  };
  current.onclose = ({ code, reason }) => {
    if (current !== socket) return;
    if (code === POLICY_VIOLATION) {
      show("closed", `closed: ${reason}`);
      return;
    }
    if (openedAt !== null && performance.now() - openedAt > STEADY_AFTER_MS) delayMs = FIRST_DELAY_MS;
    show("reconnecting");
    // Spread out, so that a server that restarts is not met by all its watchers at once.
    timer = setTimeout(connect, delayMs * (0.5 + Math.random()));
    delayMs = Math.min(2 * delayMs, LONGEST_DELAY_MS);
  };
}

function render(scores, highlight) {
  const gone = new Set(rows.keys());
  scores.forEach(({ playerId, score }, index) => {
    gone.delete(playerId);
    let row = rows.get(playerId);
    if (!row) rows.set(playerId, (row = newRow(playerId)));
    const before = row.score;
    row.rank.textContent = index + 1;
    row.total.textContent = numbers.format(score);
    row.score = score;
    // Moving a row in the document restarts its animation: only those that changed place are moved.
    if (board.children[index] !== row.element) board.insertBefore(row.element, board.children[index] ?? null);
    if (highlight && score !== before) flash(row.element, before === null || score > before ? "up" : "down");
  });
  for (const playerId of gone) {
    rows.get(playerId).element.remove();
    rows.delete(playerId);
  }
  empty.hidden = scores.length > 0;
}

function newRow(playerId) {
  const element = document.createElement("tr");
  const [rank, player, total] = ["rank", "player", "score"].map((name) => {
    const cell = document.createElement("td");
    cell.className = name;
    element.append(cell);
    return cell;
  });
  player.textContent = playerId;
  player.dir = "auto"; // a name written from right to left keeps to its own cell
  return { element, rank, total, score: null };
}

function flash(element, name) {
  element.classList.remove("up", "down");
  void element.offsetWidth; // lets the animation begin again
  element.classList.add(name);
}

limitChooser.value = LIMITS.includes(address.get("limit")) ? address.get("limit") : "10";
limitChooser.addEventListener("change", () => {
  address.set("limit", limitChooser.value);
  history.replaceState(null, "", `?${address}`);
  delayMs = FIRST_DELAY_MS;
  socket.close();
  connect();
});
// A laptop that wakes up, or a network that comes back, need not wait for the delay to pass.
window.addEventListener("online", () => {
  if (socket.readyState === WebSocket.CLOSED) connect();
});
connect();
