// Tables: a click on a head sorts by its column, another reverses the order; rows without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], listed = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const numbers = head.classList.contains("number");
    const first = numbers ? "descending" : "ascending", other = numbers ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const value = row => {
      const text = row.cells[column].dataset.value;
      return text === undefined ? null : numbers ? Number(text) : text;
    };
    const sign = order === "ascending" ? 1 : -1;
    const rows = listed.map((row, i) => [value(row), i, row]);
    rows.sort((a, b) => (a[0] === null) - (b[0] === null)
      || sign * (numbers ? a[0] - b[0] : String(a[0]).localeCompare(String(b[0]))) || a[1] - b[1]);
    body.append(...rows.map(row => row[2]));
  }));
}

// Swap matrix: the mouse, a tap or the tab key on an image shows its two sources beside it.
const matrix = document.querySelector(".matrix");
if (matrix) {
  const lens = document.querySelector(".lens"), cells = [...matrix.querySelectorAll("[data-clothes]")];
  const source = (side, number) => matrix.querySelector(`[data-${side}-source="${number}"]`);
  const show = cell => {
    matrix.querySelectorAll(".lit").forEach(one => one.classList.remove("lit"));
    const shown = { clothes: source("clothes", cell.dataset.clothes), pose: source("pose", cell.dataset.pose), swap: cell };
    for (const [name, from] of Object.entries(shown)) {
      from.classList.add("lit");
      const into = lens.querySelector(`[data-shows="${name}"]`);
      into.querySelector("img").src = from.querySelector("img").src;
      into.querySelector("b").textContent = from.dataset.who ?? "";
    }
  };
  for (const cell of cells)
    for (const event of ["pointerenter", "focus", "click"]) cell.addEventListener(event, () => show(cell));
  show(cells.find(cell => cell.dataset.clothes !== cell.dataset.pose) ?? cells[0]);
}
