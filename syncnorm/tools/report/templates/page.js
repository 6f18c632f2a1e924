"use strict";

// A number if the cell shows one, else its text; cells without a value are last in either direction.
function keyOf(row, column) {
  const cell = row.cells[column];
  return "key" in cell.dataset ? Number(cell.dataset.key) : cell.textContent;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return typeof a === typeof b ? a.localeCompare(b) : 0;
}

function sortTable(header) {
  const table = header.closest("table"), column = header.cellIndex, body = table.tBodies[0];
  const descending = header.getAttribute("aria-sort") === "ascending";
  const rows = [...body.rows], isNumber = (row) => typeof keyOf(row, column) === "number";
  const numbers = rows.filter(isNumber), texts = rows.filter((row) => !isNumber(row));
  for (const part of [numbers, texts]) {
    part.sort((a, b) => (descending ? -1 : 1) * compare(keyOf(a, column), keyOf(b, column)));
  }
  body.append(...numbers, ...texts);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const header of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.append(...header.childNodes);
  header.append(button);
  button.addEventListener("click", () => sortTable(header));
}

function showHints() {
  for (const region of document.querySelectorAll(".wide")) {
    region.previousElementSibling.hidden = region.scrollWidth <= region.clientWidth + 1;
  }
}

addEventListener("resize", showHints);
showHints();

for (const link of document.querySelectorAll("a[data-record]")) {
  const record = document.getElementById(link.dataset.record).textContent;
  link.href = URL.createObjectURL(new Blob([record], { type: "application/json" }));
  link.parentElement.hidden = false;
}
