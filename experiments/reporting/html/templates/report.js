"use strict";
// Sorting: a press on a column's name, and another for the other direction. Empty entries stay last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? direction : "none"));
    const sign = direction === "ascending" ? 1 : -1;
    const number = head.classList.contains("number");
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (number ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}
// The theme: as the system has it, or light, or dark; remembered where the browser allows it.
const button = document.getElementById("theme");
const themes = ["auto", "light", "dark"];
const remember = theme => { try { localStorage.setItem("theme", theme); } catch { /* private */ } };
const recall = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
function show(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  button.dataset.theme = theme;
  button.textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[theme];
}
button.addEventListener("click", () => {
  const next = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
  show(next);
  remember(next);
});
show(themes.includes(recall()) ? recall() : "auto");
