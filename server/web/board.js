// The ranked list: a table whose rows move to their new places. Player ids come from strangers: they only ever become
// text and attributes, never markup.

const MOVE_MS = 450;
const EASE_OUT_CUBIC = "cubic-bezier(0.3333, 1, 0.6667, 1)"; // 1 - (1 - t)³
const MARK_MS = 1500;
const MARGIN_PX = 100; // a row that begins this far above the screen may still be seen
const SMALLEST_STEP = 0.002; // of a share: less than a pixel

const numbers = new Intl.NumberFormat();
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Ranking {
  constructor(body, empty, onPin) {
    this.body = body;
    this.table = body.parentElement;
    this.empty = empty;
    this.onPin = onPin;
    this.rows = new Map(); // playerId → Row, for those in the list
    this.sought = "";
    this.marked = new Map(); // rows whose change is being shown → until when, the oldest first
    new ResizeObserver(() => this.measure(false)).observe(body);
  }

  get leader() {
    return this.body.firstElementChild?.dataset.player;
  }

  // Show [{playerId, score}, …]; unless `animated`, as if it had always been so.
  show(scores, pinned, animated) {
    const focused = document.activeElement;
    const best = Math.max(1, scores[0]?.score ?? 1);
    const gone = new Set(this.rows.keys());
    let moved = false;
    let digits = 1;
    scores.forEach(({ playerId, score }, index) => {
      gone.delete(playerId);
      let row = this.rows.get(playerId);
      if (!row) this.rows.set(playerId, (row = new Row(playerId, this.onPin, this.sought)));
      moved = this.put(row.element, index) || moved;
      const change = row.show(index, score, best, pinned.has(playerId));
      if (animated && change) this.mark(row, change);
      digits = Math.max(digits, row.total.textContent.length);
    });
    for (const playerId of gone) {
      this.rows.get(playerId).element.remove();
      this.rows.delete(playerId);
      moved = true;
    }
    this.empty.hidden = scores.length > 0;
    this.fit(scores.length, digits);
    if (moved) this.measure(animated && !calm.matches);
    // What is moved in the document loses the focus.
    if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  }

  // Nothing is known of this board yet.
  clear() {
    this.show([], new Set(), false);
    this.empty.hidden = true;
  }

  // Mark the rows whose player contains this text; the ranks of those.
  find(text) {
    this.sought = text.toLowerCase();
    const ranks = [];
    for (const row of this.rows.values()) if (row.seek(this.sought)) ranks.push(row.index + 1);
    return ranks.sort((one, other) => one - other);
  }

  // Whether the element had to be moved to get there.
  put(element, index) {
    const there = this.body.children[index];
    if (there === element) return false;
    this.body.insertBefore(element, there ?? null);
    return true;
  }

  // Tell the style sheet how many rows share the height, and how wide the widest score is.
  fit(rows, digits) {
    for (const [name, value] of Object.entries({ "--rows": Math.max(rows, 5), "--digits": digits })) {
      if (this.table.style.getPropertyValue(name) !== String(value)) this.table.style.setProperty(name, value);
    }
  }

  // Learn where the rows are now; those that were elsewhere come from there, as far as somebody sees it. All are read
  // before any is moved.
  measure(animated) {
    const tops = new Map([...this.rows.values()].map((row) => [row, row.element.offsetTop]));
    const from = animated ? -this.table.getBoundingClientRect().top : 0;
    const now = performance.now();
    const isSeen = (top) => top !== null && top > from - MARGIN_PX && top < from + innerHeight;
    for (const [row, top] of tops) {
      if (animated && row.top !== top && (isSeen(row.top) || isSeen(top))) {
        if (row.top === null) row.appear();
        else row.moveFrom(row.top - top, now);
      }
      row.top = top;
    }
  }

  mark(row, change) {
    row.mark(change);
    if (this.marked.has(row)) return;
    this.marked.set(row, performance.now() + MARK_MS);
    this.sweeping ??= setTimeout(() => this.sweep(), MARK_MS);
  }

  sweep() {
    const now = performance.now();
    this.sweeping = null;
    for (const [row, until] of this.marked) {
      if (until > now) {
        this.sweeping = setTimeout(() => this.sweep(), until - now);
        return;
      }
      row.unmark();
      this.marked.delete(row);
    }
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
    name.append(text("name", player), text("share"));
    rank.append(text("place"));
    const sum = text("sum");
    sum.append(text("delta"), text("total"));
    total.append(sum);
    pin.append(document.createElement("button"));
    row.dataset.player = player;
    this.element = row;
    this.player = player;
    this.place = rank.firstElementChild;
    this.bar = name.lastElementChild;
    [this.delta, this.total] = sum.children;
    this.delta.setAttribute("aria-hidden", "true");
    this.pin = pin.firstElementChild;
    this.pin.type = "button";
    this.pin.setAttribute("aria-label", `Pin ${player}`);
    this.pin.addEventListener("click", () => onPin(player));
    this.index = null;
    this.score = null;
    this.share = null;
    this.isPinned = null;
    this.gain = 0; // since its change is being shown
    this.top = null; // where it was last, in pixels
    this.move = null;
    this.movedAt = -MOVE_MS;
    this.from = 0; // how far away its last move began, in pixels
    this.seek(sought);
  }

  // By how much the score changed; 0 for a player who is new here.
  show(index, score, best, isPinned) {
    if (index !== this.index) {
      this.place.textContent = index + 1;
      this.element.dataset.place = index < 3 ? index + 1 : "";
      this.index = index;
    }
    if (isPinned !== this.isPinned) {
      this.pin.setAttribute("aria-pressed", isPinned);
      this.isPinned = isPinned;
    }
    const share = Math.max(0, score / best);
    if (this.share === null || Math.abs(share - this.share) > SMALLEST_STEP) {
      this.bar.style.transform = `scaleX(${share.toFixed(4)})`;
      this.share = share;
    }
    if (score === this.score) return 0;
    const change = this.score === null ? 0 : score - this.score;
    this.total.textContent = numbers.format(score);
    this.score = score;
    return change;
  }

  seek(sought) {
    const isFound = sought !== "" && this.player.toLowerCase().includes(sought);
    this.element.classList.toggle("found", isFound);
    return isFound;
  }

  // Show by how much the score changed, added up while it is shown.
  mark(change) {
    this.gain += change;
    this.delta.textContent = `${this.gain > 0 ? "+" : ""}${numbers.format(this.gain)}`;
    this.element.dataset.changed = this.gain < 0 ? "down" : "up";
  }

  unmark() {
    this.gain = 0;
    this.delta.textContent = "";
    delete this.element.dataset.changed;
  }

  // One animation at a time: the next begins where this one has come to, so a row that turns round does not jump.
  moveFrom(distance, now) {
    // Reckoned: asking the animation how far it is would have the style of the whole page worked out, row by row.
    const left = Math.max(0, 1 - (now - this.movedAt) / MOVE_MS);
    this.from = distance + this.from * left ** 3;
    this.movedAt = now;
    this.move?.cancel();
    this.element.classList.toggle("rising", this.from > 0);
    const frames = [{ transform: `translateY(${this.from}px)` }, { transform: "none" }];
    this.move = this.element.animate(frames, { duration: MOVE_MS, easing: EASE_OUT_CUBIC });
  }

  appear() {
    this.element.animate([{ opacity: 0 }, { opacity: 1 }], MOVE_MS);
  }
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
