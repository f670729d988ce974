"use strict";
// Examples: a row is shown if it has the chosen outcome and all words that were typed.
for (const form of document.querySelectorAll("form.filter")) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLocaleLowerCase());
  const show = () => {
    const words = form.elements.words.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const outcome = form.elements.outcome.value;
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !((!outcome || row.cells[0].textContent === outcome) && words.every((word) => texts[i].includes(word)));
      count += !row.hidden;
    });
    form.querySelector("output").value = `${count} of ${rows.length} shown`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
}
// Maps: the cell under the pointer, or reached by arrow keys, is told in words.
for (const group of document.querySelectorAll(".maps")) {
  const readout = group.querySelector(".readout");
  let here = null;
  const tell = (cell) => {
    here?.classList.remove("here");
    here = cell;
    cell.classList.add("here");
    readout.value = cell.querySelector("title").textContent;
  };
  for (const map of group.querySelectorAll("svg.map")) {
    const cells = [...map.querySelectorAll(".cell")];
    const at = (row, column) => cells.find((cell) => +cell.dataset.row === row && +cell.dataset.column === column);
    map.addEventListener("pointerover", (event) => {
      const cell = event.target.closest(".cell");
      if (cell) tell(cell);
    });
    map.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const from = cells.includes(here) ? here : null;
      const next = from ? at(+from.dataset.row + step[0], +from.dataset.column + step[1]) : cells[0];
      if (next) tell(next);
    });
  }
}
