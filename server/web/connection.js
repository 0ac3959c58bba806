// One WebSocket at a time, made again when it ends. Knows the protocol, and nothing of what is shown.

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;
const STEADY_AFTER_MS = 5_000; // a connection that lived this long resets the delay
const UNWANTED = [1002, 1007, 1008, 1009]; // what we sent was wrong, so it would end in the same way again
const NAMES_LENGTH = 1500; // of the address: some proxies take no more than 2 KiB

export class Connection {
  // `query()` and `players()` are asked at each start; `message` has a function per type;
  // `state(name, detail)` is told what is the case.
  constructor({ query, players, state, message }) {
    this.query = query;
    this.players = players;
    this.onState = state;
    this.onMessage = message;
    this.socket = null;
    this.delayMs = FIRST_DELAY_MS;
    this.isLive = true;
    this.trouble = "";
    this.hasList = false;
    this.retryAt = null;
    this.closedFor = null;
    // A laptop that wakes up, or a network that comes back, need not wait for the delay to pass.
    addEventListener("online", () => this.retryAt !== null && this.start());
  }

  get isConnected() {
    return this.hasList && this.retryAt === null && this.closedFor === null;
  }

  start() {
    clearTimeout(this.timer);
    this.retryAt = null;
    this.closedFor = null;
    const { url, others } = this.address();
    const socket = new WebSocket(url);
    let openedAt = null;
    this.socket = socket;
    this.isLive = true;
    this.trouble = "";
    this.hasList = false;
    socket.onopen = () => {
      openedAt = performance.now();
      if (others.length) this.follow(others);
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.socket) this.receive(JSON.parse(data));
    };
    socket.onclose = ({ code, reason }) => {
      if (socket !== this.socket) return;
      if (UNWANTED.includes(code)) {
        this.closedFor = reason || "by the server";
        this.tell();
        return;
      }
      if (openedAt !== null && performance.now() - openedAt > STEADY_AFTER_MS) this.delayMs = FIRST_DELAY_MS;
      this.retry(reason);
    };
    this.tell();
  }

  // Ask again for something else.
  restart() {
    const before = this.socket;
    this.delayMs = FIRST_DELAY_MS;
    this.start();
    if (before?.readyState === WebSocket.CONNECTING) before.onopen = () => before.close(); // earlier, the browser warns
    else before?.close();
  }

  follow(players) {
    this.send({ type: "subscribe", players });
  }

  unfollow(players) {
    this.send({ type: "unsubscribe", players });
  }

  tell() {
    if (this.closedFor !== null) this.onState("closed", this.closedFor);
    else if (this.retryAt !== null) {
      const left = Math.ceil((this.retryAt - performance.now()) / 1000);
      this.onState("reconnecting", left > 0 ? `in ${left} s` : "");
    } else if (!this.hasList) this.onState("connecting", "");
    else this.onState(this.isLive ? "live" : "delayed", this.trouble);
  }

  // Where to connect, and the players who do not fit in there.
  address() {
    const others = [];
    let names = "";
    for (const player of this.players()) {
      const more = names ? `${names},${player}` : player;
      if (player.includes(",") || encodeURIComponent(more).length > NAMES_LENGTH) others.push(player);
      else names = more;
    }
    const query = new URLSearchParams(this.query());
    if (names) query.set("players", names);
    // A proxy may serve the page below a path of its own.
    const url = new URL("live-updates", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = query;
    return { url, others };
  }

  receive(message) {
    if (message.type === "status") {
      this.isLive = message.live;
      this.trouble = message.detail ?? "";
    }
    if (message.type === "leaderboardUpdate") this.hasList = true;
    if (message.type === "error") console.info(`the server refused a message: ${message.detail}`);
    this.onMessage[message.type]?.(message);
    if (message.type === "status" || message.type === "leaderboardUpdate") this.tell();
  }

  send(message) {
    // While it is not open the names go with the next address.
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  retry(reason) {
    // Spread out, so that a server that restarts is not met by all its watchers at once; it may say over how long.
    const hintMs = 1000 * (reason.match(/within (\d+) s/)?.[1] ?? 0);
    const waitMs = Math.random() * Math.max(this.delayMs, hintMs);
    this.delayMs = Math.min(2 * this.delayMs, LONGEST_DELAY_MS);
    this.retryAt = performance.now() + waitMs;
    this.timer = setTimeout(() => this.start(), waitMs);
    this.tell();
  }
}
