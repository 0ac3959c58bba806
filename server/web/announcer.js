// What is read out to those who do not see the board: one sentence every ten seconds at most, the latest that counts.

const PAUSE_MS = 10_000;

export class Announcer {
  constructor(region) {
    this.region = region;
    this.quietUntil = 0;
    this.timer = null;
    this.waiting = null;
  }

  // Say it when it is time; until then a later sentence takes its place, unless it is of less `weight`.
  say(sentence, weight = 0) {
    if (weight < (this.waiting?.weight ?? 0)) return;
    this.waiting = { sentence, weight };
    if (this.timer === null) this.timer = setTimeout(() => this.speak(), this.quietUntil - performance.now());
  }

  speak() {
    this.timer = null;
    this.quietUntil = performance.now() + PAUSE_MS;
    this.region.textContent = this.waiting.sentence;
    this.waiting = null;
  }
}
