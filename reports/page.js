"use strict";
// Sorting and filtering of the tables, and what a pass drafted and rejected. Without it the page loses only that.

for (const table of document.querySelectorAll("table.results")) sortable(table);
for (const form of document.querySelectorAll("form.filters")) filterable(form);
for (const hint of document.querySelectorAll(".scripted")) hint.hidden = false;
for (const text of document.querySelectorAll("p.tokens[role]")) explained(text);

/** A button in every heading; rows are sorted within their target, those without a value last. */
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.sort === "high" ? "descending" : "ascending";
      const turned = first === "descending" ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? turned : first;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      for (const body of table.tBodies) sort(body, column, order === "ascending" ? 1 : -1);
    });
  });
}

function sort(body, column, direction) {
  const rows = [...body.rows].filter((row) => !row.classList.contains("target"));
  const key = (row) => {
    const cell = row.cells[column];
    const value = cell.dataset.v;
    return value === undefined ? (column === 0 || cell.classList.contains("verdict") ? cell.textContent.trim() : null) : Number(value);
  };
  const keyed = rows.map((row) => [key(row), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
  body.append(...keyed.map(([, row]) => row));
}

/** Rows of the chosen category whose method, bits and runtime fit; how many they are is told. */
function filterable(form) {
  const table = document.getElementById(form.dataset.table);
  const fields = [...form.querySelectorAll("[data-filter]")];
  const apply = () => {
    const want = Object.fromEntries(fields.map((field) => [field.dataset.filter, field.value]));
    const method = (want.method || "").toLowerCase();
    let shown = 0;
    let all = 0;
    for (const body of table.tBodies) {
      const fits = ["bits", "runtime"].every((name) => !want[name] || body.dataset[name] === want[name]);
      let left = 0;
      for (const row of body.rows) {
        if (row.classList.contains("target")) continue;
        const chosen = row.dataset.category === (want.category || "");
        row.hidden = !(fits && chosen && row.cells[0].textContent.toLowerCase().includes(method));
        all += chosen;
        left += !row.hidden;
      }
      body.hidden = left === 0;
      shown += left;
    }
    form.querySelector("output").textContent = shown + " of " + all + " rows";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

/** One stop of the tab key a text, arrow keys from pass to pass, and a note at the pass that is pointed at. */
function explained(text) {
  const tip = document.getElementById("tip");
  const passes = [...text.children];
  let at = -1;
  const show = (index) => {
    if (passes[at]) passes[at].classList.remove("at");
    at = index;
    const pass = passes[at];
    tip.hidden = !pass;
    if (!pass) return;
    pass.classList.add("at");
    tip.textContent = pass.dataset.t;
    tip.style.left = "0"; // where it is as wide as it can be, which is measured next
    const box = pass.getClientRects()[0];
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = left + scrollX + "px";
    tip.style.top = (above > 0 ? above : box.bottom + 6) + scrollY + "px";
  };
  text.addEventListener("mouseover", (event) => show(passes.indexOf(event.target.closest("[data-t]"))));
  text.addEventListener("mouseleave", () => show(-1));
  text.addEventListener("blur", () => show(-1));
  text.addEventListener("keydown", (event) => {
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: passes.length - 1, Escape: -1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(next < 0 && event.key !== "Escape" ? 0 : Math.min(next, passes.length - 1));
  });
}
