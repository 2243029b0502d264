// Sorts the cohort's table by the column whose heading is pressed; rows without a value stay last.
"use strict";
(() => {
  const body = document.querySelector(".cohort tbody");
  const heads = [...document.querySelectorAll(".cohort thead th")];
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.sort) return Number(cell.dataset.sort);
    const data = cell.querySelector("data");
    return data ? Number(data.value) : cell.querySelector(".none") ? null : cell.textContent.trim();
  };
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a, column), y = value(b, column);
        if (x === null || y === null) return (x === null) - (y === null);
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
})();
