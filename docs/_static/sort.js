// A click on a table's head sorts its rows: numbers by value, everything else as text.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    const body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach((head, column) => {
      head.tabIndex = 0;
      head.setAttribute("aria-sort", "none");
      const sort = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const text = (row) => (row.cells[column]?.textContent ?? "").trim().replace("−", "-");
        const order = (a, b) => {
          const [x, y] = [parseFloat(text(a)), parseFloat(text(b))];
          if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
          const way = down ? -1 : 1;
          return way * (Number.isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
        };
        [...body.rows].sort(order).forEach((row) => body.append(row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
});
