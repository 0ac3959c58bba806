// What is read out to those who do not see the board: one sentence every ten seconds at most, and the latest only.

const PAUSE_MS = 10_000;

export class Announcer {
  constructor(region) {
    this.region = region;
    this.quietUntil = 0;
    this.timer = null;
  }

  say(sentence) {
    this.next = sentence;
    if (this.timer !== null) return;
    this.timer = setTimeout(() => {
      this.timer = null;
      this.quietUntil = performance.now() + PAUSE_MS;
      this.region.textContent = this.next;
    }, Math.max(0, this.quietUntil - performance.now()));
  }
}
