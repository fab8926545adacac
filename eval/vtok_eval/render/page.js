"use strict";
(() => {
  const table = document.getElementById("results");
  if (table) {
    const body = table.querySelector("tbody.entries");
    const heads = [...table.querySelectorAll("th[data-key]")];
    // the first row of the head holds method and keep, the second the rest, in the order of the cells
    const column = new Map(heads.map((head, place) => [head, place]));
    const value = (row, place) => row.cells[place].dataset.v;
    const compare = (place, sign) => (a, b) => {
      const [x, y] = [value(a, place), value(b, place)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return sign * order;
    };
    const sort = (head) => {
      const before = head.getAttribute("aria-sort");
      const rising = head.dataset.key === "name" || "rising" in head.dataset;
      const next = before === "ascending" ? "descending" : before === "descending" ? "ascending" : rising ? "ascending" : "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const rows = [...body.rows].sort(compare(column.get(head), next === "ascending" ? 1 : -1));
      table.classList.toggle("mixed", head.dataset.key !== "keep");
      body.append(...rows);
    };
    heads.forEach((head) => {
      head.tabIndex = 0;
      head.classList.add("sorts");
      head.addEventListener("click", () => sort(head));
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          sort(head);
        }
      });
    });
    const filter = document.querySelector(".filter");
    if (filter) {
      filter.hidden = false;
      filter.addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (!button) return;
        filter.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", other === button));
        for (const row of body.rows) row.hidden = button.dataset.only !== "" && row.dataset.keep !== button.dataset.only;
      });
    }
  }
  // pointing at a series picks it out in all charts of its section; a click on the legend holds it
  document.querySelectorAll(".plots").forEach((plots) => {
    let held = null;
    const show = (name) => {
      plots.classList.toggle("focused", name !== null);
      plots.querySelectorAll("[data-s]").forEach((item) => item.classList.toggle("picked", item.dataset.s === name));
    };
    const of = (event) => event.target.closest("[data-s]");
    plots.addEventListener("mouseover", (event) => show(of(event) ? of(event).dataset.s : held));
    plots.addEventListener("mouseleave", () => show(held));
    plots.addEventListener("click", (event) => {
      const item = of(event);
      if (!item) return;
      held = held === item.dataset.s ? null : item.dataset.s;
      plots.querySelectorAll("button[data-s]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.s === held));
      show(held);
    });
  });
})();
