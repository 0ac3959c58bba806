// A figure of now, and its course over the last minute as a line.

const SECONDS = 60;
const FRESH = 5; // seconds that a figure counts as the current one
const WIDTH = 240;
const HEIGHT = 48;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  // `figure` has a caption and places for the figures; `format` puts a value into words.
  constructor(figure, format) {
    this.format = format;
    this.now = figure.querySelector(".now");
    this.most = figure.querySelector(".most");
    this.name = figure.querySelector("figcaption").textContent;
    this.values = [];
    this.picture = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.area = this.picture.appendChild(make("path", { class: "area" }));
    this.line = this.picture.appendChild(make("path", { class: "line" }));
    figure.append(this.picture);
    this.draw();
  }

  // The value of the second that has just passed; null when there is none.
  add(value) {
    this.values.push(value);
    if (this.values.length > SECONDS) this.values.shift();
    this.draw();
  }

  draw() {
    const known = this.values.filter((value) => value !== null);
    const current = this.values.slice(-FRESH).findLast((value) => value !== null);
    const most = Math.max(0, ...known);
    this.now.textContent = current === undefined ? "–" : this.format(current);
    this.most.textContent = known.length ? `${this.format(most)} at most` : "";
    this.picture.setAttribute("aria-label", `${this.name}, the last minute: ${this.most.textContent || "none yet"}`);
    const first = SECONDS - this.values.length;
    const points = this.values.flatMap((value, index) => {
      if (value === null) return [];
      const x = ((first + index) / (SECONDS - 1)) * WIDTH;
      return [[x.toFixed(1), (HEIGHT - 1 - (value / (most || 1)) * (HEIGHT - 3)).toFixed(1)]];
    });
    const line = points.map(([x, y]) => `${x} ${y}`).join("L");
    this.line.setAttribute("d", line && `M${line}`);
    this.area.setAttribute("d", line && `M${points[0][0]} ${HEIGHT}L${line}L${points.at(-1)[0]} ${HEIGHT}Z`);
  }
}

function make(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}
