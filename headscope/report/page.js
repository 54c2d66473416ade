"use strict";
(() => {
  const table = document.getElementById("table");
  if (table) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const number = (row, column) => Number(row.cells[column].dataset.value);

    // Missing values come last in both directions; ties keep the heads' order.
    const sortBy = (column) => {
      const now = heads[column].getAttribute("aria-sort");
      const down = column < 2 ? now === "ascending" : now !== "descending";
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const order = (a, b) => {
        const [x, y] = [number(a, column), number(b, column)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return sign * (x - y) || number(a, 0) - number(b, 0);
      };
      body.append(...[...body.rows].sort(order));
    };
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sortBy(column));
    });

    const filter = document.getElementById("filter");
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toUpperCase();
      const whole = /H\d*$|\D$/.test(wanted) ? "" : "H"; // "L1" means layer 1, not layer 10
      let shown = 0;
      for (const row of body.rows) {
        const name = row.cells[0].textContent;
        row.hidden = wanted !== "" && !(name === wanted || name.startsWith(wanted + whole));
        shown += !row.hidden;
      }
      document.getElementById("count").textContent = `${shown} heads`;
    });
  }

  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = () => ({
    "font.color": dark.matches ? "#d7dce2" : "#24292f",
    paper_bgcolor: "rgba(0,0,0,0)",
    "modebar.bgcolor": "rgba(0,0,0,0)",
  });
  // Some pictures come in both themes; the others keep their colours but for the text.
  const drawn = (figure) => figure.light ? figure[dark.matches ? "dark" : "light"] : figure;
  const plots = [...document.querySelectorAll("figure[data-score], figure[data-figure]")].map((holder) => {
    const figure = figures[holder.dataset.score ?? holder.dataset.figure];
    const plot = holder.querySelector(".plot");
    Plotly.newPlot(plot, drawn(figure).data, drawn(figure).layout, {
      displaylogo: false,
      modeBarButtons: [["toImage", "resetScale2d"]],
    });
    return { plot, figure };
  });
  const dress = () => plots.forEach(({ plot, figure }) => {
    if (figure.light) Plotly.react(plot, drawn(figure).data, drawn(figure).layout);
    else Plotly.relayout(plot, ink());
  });
  dress();
  dark.addEventListener("change", dress);
})();
