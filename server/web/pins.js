// The players one follows by name, wherever they stand. Kept by the browser, for each board.

import { text } from "./board.js";

const MOST = 100; // that the server lets one follow
const LONGEST = 128; // of a name, in characters

const numbers = new Intl.NumberFormat();

export class Pins {
  // `added`, `removed` and `changed` are called when the reader pins or unpins somebody.
  constructor(list, hint, { added, removed, changed }) {
    this.list = list;
    this.hint = hint;
    this.on = { added, removed, changed };
    this.players = new Set();
    this.scores = new Map(); // playerId → score, as far as it is known
    this.items = new Map();
  }

  forBoard(board) {
    // Storage belongs to all that a proxy serves under this name: other scoreboards, too.
    const place = new URL(".", document.baseURI).pathname;
    this.key = place === "/" ? `pins:${board}` : `pins:${place}:${board}`;
    this.players = new Set(load(this.key));
    this.scores.clear();
    this.list.replaceChildren();
    this.items.clear();
    this.on.changed();
  }

  toggle(player) {
    if (this.players.has(player)) this.remove(player);
    else this.add(player);
  }

  // Why the player cannot be pinned; null when it is.
  add(player) {
    if (this.players.has(player)) return "Pinned already";
    if ([...player].length > LONGEST) return `A name has at most ${LONGEST} characters`;
    if (!isName(player)) return "That is no name";
    if (this.players.size >= MOST) return `At most ${MOST} players can be pinned`;
    this.players.add(player);
    this.keep();
    this.on.added(player);
    return null;
  }

  remove(player) {
    this.players.delete(player);
    this.scores.delete(player);
    this.items.get(player)?.leave();
    this.items.delete(player);
    this.keep();
    this.on.removed(player);
  }

  // Take a score that was sent; whether it is of a pinned player.
  learn(player, score) {
    if (!this.players.has(player)) return false;
    this.scores.set(player, score);
    return true;
  }

  // Before anything came (`isKnown`) nobody is said to have no score. `say` is told, in a sentence, what changed.
  show(top, isKnown, say) {
    const places = new Map(top.map(({ playerId, score }, index) => [playerId, { rank: index + 1, score }]));
    for (const player of this.players) {
      let item = this.items.get(player);
      if (!item) {
        this.items.set(player, (item = new Item(player, () => this.remove(player))));
        this.list.append(item.element);
      }
      const { rank, score } = places.get(player) ?? { score: this.scores.get(player) };
      if (isKnown) item.show(score, rank, say);
    }
    this.hint.hidden = this.players.size > 0;
    this.list.hidden = this.players.size === 0;
  }

  keep() {
    try {
      localStorage.setItem(this.key, JSON.stringify([...this.players]));
    } catch {
      // A browser that keeps nothing still pins until it is closed.
    }
    this.on.changed();
  }
}

class Item {
  constructor(player, onRemove) {
    this.player = player;
    this.element = document.createElement("li");
    this.rank = text("rank");
    this.total = text("total", "…");
    this.isShown = false;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.setAttribute("aria-label", `Unpin ${player}`);
    remove.addEventListener("click", onRemove);
    this.element.append(this.rank, text("name", player), this.total, remove);
  }

  // Whoever works with the keyboard is led on to the next one.
  leave() {
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling;
    if (this.element.contains(document.activeElement)) next?.querySelector("button").focus();
    this.element.remove();
  }

  show(score, rank, say) {
    if (this.isShown && score === this.score && rank === this.place) return;
    const total = score === undefined ? "no score yet" : numbers.format(score);
    // Scores of those in the list change all the time: only a new rank is worth a sentence.
    const isNews = rank === undefined ? score !== undefined : rank !== this.place;
    if (this.isShown && isNews) say(rank ? `${this.player} is now ${rank}, with ${total}` : `${this.player} has ${total}`);
    this.rank.textContent = rank ?? "";
    this.total.textContent = total;
    this.element.classList.toggle("unscored", score === undefined);
    [this.score, this.place, this.isShown] = [score, rank, true];
  }
}

function load(key) {
  try {
    const kept = JSON.parse(localStorage.getItem(key) ?? "[]");
    return [...new Set(kept.filter(isName))].slice(0, MOST);
  } catch {
    return [];
  }
}

// Whether a player may have this name; of any other the server would close the connection, again and again. What
// counts are characters, where `length` counts halves of some; half a character has no UTF-8.
function isName(name) {
  return typeof name === "string" && name !== "" && [...name].length <= LONGEST && !/\p{Surrogate}/u.test(name);
}
