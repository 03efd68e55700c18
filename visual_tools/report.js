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
