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
// What is folded opens for who follows a link to it, and on paper.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let d = target.closest("details"); d; d = d.parentElement.closest("details")) d.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link && link.hash === location.hash) reveal();
});
if (location.hash) reveal();
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details.print:not([open])")];
  unfolded.forEach((d) => { d.open = true; });
});
addEventListener("afterprint", () => unfolded.forEach((d) => { d.open = false; }));
