// Runs before the page is drawn, so that it does not flash in the wrong colours.
try {
  const theme = localStorage.getItem("qlib-theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch (error) { /* no storage: the system's theme is used */ }
