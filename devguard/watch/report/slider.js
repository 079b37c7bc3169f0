"use strict";
// Shows the matrix of processes and GPUs at the moment that the slider has. Without it the page shows the worst one.
(() => {
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

  // As format_size of devguard.support.terminal: one decimal, and half of a tenth goes to the even one.
  const formatSize = (bytes) => {
    if (bytes < 1024) return `${bytes} B`;
    const power = Math.min(Math.floor(Math.log2(bytes) / 10), 4);
    const tenths = (bytes * 10) / 1024 ** power;
    const below = Math.floor(tenths);
    const half = tenths - below === 0.5;
    const rounded = half ? below + (below % 2) : Math.round(tenths);
    return `${(rounded / 10).toFixed(1)} ${UNITS[power]}`;
  };

  const data = (bytes) => {
    const node = document.createElement("data");
    node.value = bytes;
    node.textContent = formatSize(bytes);
    return node;
  };

  const start = (part) => {
    const found = JSON.parse(document.getElementById(part.dataset.moments).textContent);
    const table = part.querySelector("table");
    const rows = table.tBodies[0].rows;
    const totals = table.tFoot.rows[0].cells;
    const input = part.querySelector("input");

    const fill = (cell, value) => {
      if (value === undefined) {
        cell.className = "none";
        cell.replaceChildren("-");
        return;
      }
      const [verdict, bytes] = value;
      const word = document.createElement("b");
      word.textContent = found.verdicts[verdict];
      cell.className = found.classes[verdict];
      cell.replaceChildren(word, ...(bytes === null ? [] : [" ", data(bytes)]));
    };

    const show = () => {
      const moment = Number(input.value);
      const cells = new Map();
      for (const step of found.moments.slice(0, moment + 1)) {
        for (const [row, column, ...value] of step.set) {
          if (value.length) cells.set(`${row},${column}`, value);
          else cells.delete(`${row},${column}`);
        }
      }
      for (let row = 0; row < rows.length; row += 1) {
        for (let column = 0; column < found.columns; column += 1) {
          fill(rows[row].cells[found.heads + column], cells.get(`${row},${column}`));
        }
      }
      const { label, all } = found.moments[moment];
      all.forEach((held, column) => totals[1 + column].replaceChildren(data(held)));
      input.setAttribute("aria-valuetext", label);
      part.querySelector("caption").textContent = label;
    };

    input.addEventListener("input", show);
    part.querySelector("button").addEventListener("click", () => {
      input.value = found.worst;
      show();
    });
    part.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    input.value = found.worst;
    part.querySelector("form").hidden = false;
  };

  for (const part of document.querySelectorAll("[data-moments]")) start(part);
})();
