// The players one follows by name, wherever they stand. Kept by the browser, for each board.

import { badge, text } from "./board.js";

const MOST = 100; // that the server lets one follow

const numbers = new Intl.NumberFormat();

export class Pins {
  // `added`, `removed` and `changed` are called when the reader pins or unpins somebody.
  constructor(list, { added, removed, changed }) {
    this.list = list;
    this.on = { added, removed, changed };
    this.players = [];
    this.scores = new Map(); // playerId → score, as far as it is known
    this.items = new Map();
  }

  forBoard(board) {
    this.key = `pins:${board ?? ""}`;
    this.players = load(this.key);
    this.scores.clear();
    this.list.replaceChildren();
    this.items.clear();
    this.on.changed();
  }

  toggle(player) {
    if (this.players.includes(player)) this.remove(player);
    else this.add(player);
  }

  // Why the player cannot be pinned; null when it is.
  add(player) {
    if (this.players.includes(player)) return `${player} is pinned already`;
    if (player.includes(",")) return "A name with a comma cannot be pinned";
    if (this.players.length >= MOST) return `At most ${MOST} players can be pinned`;
    this.players = [...this.players, player];
    this.keep();
    this.on.added(player);
    return null;
  }

  remove(player) {
    this.players = this.players.filter((each) => each !== player);
    this.scores.delete(player);
    this.items.get(player)?.element.remove();
    this.items.delete(player);
    this.keep();
    this.on.removed(player);
  }

  // Take a score that was sent; whether it is of a pinned player.
  learn(player, score) {
    if (!this.players.includes(player)) return false;
    this.scores.set(player, score);
    return true;
  }

  // `say` is told, in a sentence, what changed for a pinned player.
  show(top, say) {
    const places = new Map(top.map(({ playerId, score }, index) => [playerId, { rank: index + 1, score }]));
    for (const player of this.players) {
      let item = this.items.get(player);
      if (!item) {
        this.items.set(player, (item = new Item(player, () => this.remove(player))));
        this.list.append(item.element);
      }
      const place = places.get(player);
      item.show(place?.score ?? this.scores.get(player), place?.rank, say);
    }
  }

  keep() {
    try {
      localStorage.setItem(this.key, JSON.stringify(this.players));
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
    this.total = text("total");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Unpin ${player}`);
    remove.addEventListener("click", onRemove);
    this.element.append(badge(player), text("name", player), this.rank, this.total, remove);
  }

  show(score, rank, say) {
    const total = score === undefined ? "no score yet" : numbers.format(score);
    if (total !== this.total.textContent) {
      if (this.total.textContent) say(`${this.player}: ${total}${rank ? `, rank ${rank}` : ""}`);
      this.total.textContent = total;
    }
    this.rank.textContent = rank ? `#${rank}` : "";
  }
}

function load(key) {
  try {
    const kept = JSON.parse(localStorage.getItem(key) ?? "[]");
    return kept.filter((player) => typeof player === "string" && player && !player.includes(",")).slice(0, MOST);
  } catch {
    return [];
  }
}
