// Light, dark, or as the system has it: chosen with one button, and kept by the browser. No module, so that it runs
// before the page is drawn.
"use strict";

{
  const THEMES = ["system", "light", "dark"];
  const root = document.documentElement;

  const kept = () => {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null; // storage may be forbidden
    }
  };

  const choose = (theme) => {
    root.dataset.theme = THEMES.includes(theme) ? theme : "system";
  };

  choose(kept());

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const tell = () => {
      button.title = `Colours: ${root.dataset.theme}`;
      button.setAttribute("aria-label", button.title);
    };
    button.addEventListener("click", () => {
      choose(THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length]);
      tell();
      try {
        localStorage.setItem("theme", root.dataset.theme);
      } catch {
        // It then lasts until the page is closed.
      }
    });
    tell();
  });
}
