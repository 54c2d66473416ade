"use strict";
// Heatmaps of all scores and the pictures of runs, each drawn when it comes into view.
(() => {
  const { element, data, models, limits, scaleOf, atlas, dark, theme } = headscope;
  const maps = document.getElementById("heatmaps");
  const rest = element("div", { class: "maps" });
  const drawn = [];

  const heatmap = (model, score) => {
    const [low, high] = limits(score);
    const z = Array.from({ length: model.layers }, (_, layer) => Array.from({ length: model.heads }, (_, head) => {
      const value = score.mean[layer * model.heads + head];
      return Number.isFinite(value) ? value : null;
    }));
    const side = Math.min(26, Math.max(5, 300 / Math.max(model.layers, model.heads)));
    const style = data.styles[theme()];
    const axis = (title, size) => ({ title: { text: title, standoff: 4 }, showgrid: false, zeroline: false, ticks: "", dtick: size <= 16 ? (size <= 8 ? 1 : 2) : 8 });
    return {
      data: [{ type: "heatmap", z, zmin: low, zmax: high, colorscale: scaleOf(score), hovertemplate: "L%{y}H%{x}: %{z:.3g}<extra></extra>", xgap: side > 9 ? 1 : 0, ygap: side > 9 ? 1 : 0, colorbar: { thickness: 10, outlinewidth: 0 } }],
      layout: {
        width: Math.max(230, side * model.heads + 125), height: Math.max(150, side * model.layers + 65),
        margin: { l: 45, r: 70, t: 8, b: 42 }, font: { family: "system-ui, sans-serif", size: 11, color: style.text },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: style.missing,
        xaxis: { ...axis("head", model.heads), range: [-0.5, model.heads - 0.5] },
        yaxis: { ...axis("layer", model.layers), range: [model.layers - 0.5, -0.5] },
      },
    };
  };
  const settings = { displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  const draw = (one) => {
    const { data: traces, layout } = one.figure();
    Plotly.react(one.plot, traces, layout, settings);
    one.done = true;
  };
  const watch = (plot, figure) => {
    const one = { plot, figure, done: false };
    drawn.push(one);
    watcher.observe(plot);
    return one;
  };
  const watcher = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
    watcher.unobserve(entry.target);
    draw(drawn.find((one) => one.plot === entry.target));
  }), { rootMargin: "300px" });

  for (const model of models) {
    for (const score of model.scores) {
      const best = [...score.mean.keys()].filter((head) => Number.isFinite(score.mean[head])).sort((a, b) => score.mean[b] - score.mean[a]).slice(0, 3);
      const told = best.map((head) => `${model.headName(head)} ${headscope.written(score.mean[head])}`).join(", ");
      const plot = element("div", { class: "plot scroll", role: "img", "aria-label": `Heatmap of ${score.name}, layers by heads. Largest: ${told}.` });
      const title = element("button", { type: "button", class: "link", title: "Colour the grid of heads by this score", onclick: () => atlas.colour(score.name) }, score.name.replaceAll("_", " "));
      plot.style.minHeight = `${Math.max(150, Math.min(26, Math.max(5, 300 / Math.max(model.layers, model.heads))) * model.layers + 65)}px`;
      const place = model.scores.indexOf(score) < data.columns ? maps : rest;
      place.append(element("figure", { class: "map" }, element("h3", {}, title, models.length > 1 ? ` ${model.name}` : "", " ", element("small", {}, score.unit)), plot, element("figcaption", { class: "quiet" }, `${score.description.replace(/[.]?$/, ".")} Largest: ${told}.`)));
      watch(plot, () => heatmap(model, score));
    }
  }
  if (rest.childElementCount) {
    maps.after(element("details", {}, element("summary", {}, `${rest.childElementCount} more`), rest));
  }
  for (const holder of document.querySelectorAll("figure[data-figure]")) {
    const figure = data.pictures[holder.dataset.figure];
    watch(holder.querySelector(".plot"), () => figure[theme()]);
  }
  dark.addEventListener("change", () => drawn.filter((one) => one.done).forEach(draw));
  // Printed pages show everything.
  addEventListener("beforeprint", () => drawn.filter((one) => !one.done).forEach(draw));
})();
