const root = document.documentElement;
const code = document.getElementById("toggle-code");
const theme = document.getElementById("toggle-theme");
const contents = document.querySelector("nav.contents details");
const themes = ["auto", "light", "dark"];

function sayTheme() {
  theme.textContent = "Theme: " + (root.dataset.theme || "auto");
}
code.addEventListener("click", () => {
  const shown = root.classList.toggle("show-code");
  code.setAttribute("aria-pressed", String(shown));
});
theme.addEventListener("click", () => {
  const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
  root.dataset.theme = next;
  try { localStorage.setItem("qlib-theme", next); } catch (error) { /* it lasts as long as the page */ }
  sayTheme();
});
sayTheme();
const narrow = matchMedia("(max-width: 64rem)");
const fold = () => { contents.open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();
contents.addEventListener("click", (event) => {
  if (narrow.matches && event.target.closest("a")) contents.open = false;
});
addEventListener("beforeprint", () => document.querySelectorAll("details.print").forEach((d) => { d.open = true; }));
