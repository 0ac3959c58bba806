// The ranked list: a table whose rows move to their new places. Player ids come from strangers: they only ever become
// text and attributes, never markup.

const MOVE_MS = 450;
const MARK_MS = 1500;
const MOVES_AT_ONCE = 3; // of one row; an older one is over when a newer one begins

const numbers = new Intl.NumberFormat();
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Ranking {
  constructor(body, empty, onPin) {
    this.body = body;
    this.empty = empty;
    this.onPin = onPin;
    this.rows = new Map(); // playerId → Row, for those in the list
    this.sought = "";
    this.height = 0; // of a row: all are of one height, so nothing needs to be measured while they move
    new ResizeObserver(() => {
      this.height = this.body.firstElementChild?.getBoundingClientRect().height ?? 0;
    }).observe(body);
  }

  get leader() {
    return this.body.firstElementChild?.dataset.player;
  }

  // Show [{playerId, score}, …]; unless `animated`, as if it had always been so.
  show(scores, pinned, animated) {
    const focused = document.activeElement;
    const gone = new Set(this.rows.keys());
    const best = Math.max(1, scores[0]?.score ?? 1);
    scores.forEach(({ playerId, score }, index) => {
      gone.delete(playerId);
      let row = this.rows.get(playerId);
      const isNew = !row;
      if (isNew) this.rows.set(playerId, (row = new Row(playerId, this.onPin, this.sought)));
      this.put(row.element, index);
      if (animated && isNew) row.appear();
      if (animated && !isNew && index !== row.index) row.moveFrom((row.index - index) * this.height);
      row.show(index, score, best, pinned.includes(playerId), animated);
    });
    for (const playerId of gone) {
      this.rows.get(playerId).element.remove();
      this.rows.delete(playerId);
    }
    this.empty.hidden = scores.length > 0;
    this.body.parentElement.style.setProperty("--rows", Math.max(scores.length, 5));
    // What is moved in the document loses the focus.
    if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  }

  // Mark the rows whose player contains this text; how many those are.
  find(text) {
    this.sought = text.toLowerCase();
    let found = 0;
    for (const row of this.rows.values()) found += row.seek(this.sought);
    return found;
  }

  put(element, index) {
    const there = this.body.children[index];
    if (there !== element) this.body.insertBefore(element, there ?? null);
  }
}

class Row {
  constructor(player, onPin, sought) {
    const row = document.createElement("tr");
    const [rank, name, total, pin] = ["rank", "player", "score", "pin"].map((kind) => {
      const cell = document.createElement(kind === "player" ? "th" : "td");
      cell.className = kind;
      row.append(cell);
      return cell;
    });
    name.scope = "row";
    name.append(badge(player), text("name", player), text("share"));
    total.append(text("delta"), text("total"));
    pin.append(document.createElement("button"));
    row.dataset.player = player;
    this.element = row;
    this.player = player;
    this.rank = rank;
    this.share = name.lastElementChild;
    [this.delta, this.total] = total.children;
    this.pin = pin.firstElementChild;
    this.pin.type = "button";
    this.pin.addEventListener("click", () => onPin(player));
    this.index = null;
    this.score = null;
    this.gain = 0;
    this.moves = [];
    this.seek(sought);
  }

  show(index, score, best, isPinned, animated) {
    if (index !== this.index) {
      this.rank.textContent = index + 1;
      this.element.dataset.place = index < 3 ? index + 1 : "";
      this.index = index;
    }
    if (score !== this.score) {
      this.total.textContent = numbers.format(score);
      if (animated && this.score !== null) this.mark(score - this.score);
      this.score = score;
    }
    this.share.style.setProperty("--share", Math.max(0, score / best).toFixed(4));
    if (this.pin.getAttribute("aria-pressed") !== String(isPinned)) {
      this.pin.setAttribute("aria-pressed", isPinned);
      this.pin.setAttribute("aria-label", `Pin ${this.player}`);
    }
  }

  seek(sought) {
    const isFound = sought !== "" && this.player.toLowerCase().includes(sought);
    this.element.classList.toggle("found", isFound);
    return isFound ? 1 : 0;
  }

  moveFrom(distance) {
    if (calm.matches || !distance) return;
    this.element.classList.toggle("rising", distance > 0);
    // Added to what still moves it, so a row that turns round midway does not jump.
    const frames = [{ transform: `translateY(${distance}px)` }, { transform: "translateY(0)" }];
    const timing = { duration: MOVE_MS, easing: "cubic-bezier(.2,.8,.2,1)", composite: "add" };
    const move = this.element.animate(frames, timing);
    this.moves = this.moves.filter((each) => each.playState === "running");
    if (this.moves.length >= MOVES_AT_ONCE) this.moves.shift().finish();
    this.moves.push(move);
  }

  appear() {
    if (!calm.matches) this.element.animate([{ opacity: 0 }, { opacity: 1 }], { duration: MOVE_MS });
  }

  // Show by how much the score changed, added up while it is shown.
  mark(change) {
    clearTimeout(this.marked);
    this.gain += change;
    this.delta.textContent = `${this.gain > 0 ? "+" : ""}${numbers.format(this.gain)}`;
    const way = this.gain < 0 ? "down" : "up";
    this.element.dataset.changed = way;
    this.marked = setTimeout(() => {
      this.gain = 0;
      this.delta.textContent = "";
      delete this.element.dataset.changed;
    }, MARK_MS);
    if (calm.matches) return;
    this.tint?.cancel();
    const timing = { duration: MARK_MS, easing: "ease-out" };
    this.tint = this.element.animate([{ backgroundColor: `var(--${way}-tint)` }, {}], timing);
  }
}

export function badge(player) {
  let hash = 0;
  for (const character of player) hash = (hash * 31 + character.codePointAt(0)) | 0;
  const made = text("badge", [...player][0].toUpperCase());
  made.style.setProperty("--hue", Math.abs(hash) % 360);
  made.setAttribute("aria-hidden", "true");
  return made;
}

export function text(kind, content = "") {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = content;
  if (kind === "name") {
    made.title = content;
    made.dir = "auto"; // a name written from right to left keeps to its own cell
  }
  return made;
}
