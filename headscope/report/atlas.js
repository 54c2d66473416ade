"use strict";
// The grid of all heads of each model: colour, keyboard, choice.
headscope.atlas = (() => {
  const { element, rgb, ink, data, models, colourOf, scaleOf, limits, written, parsed } = headscope;
  const chooser = document.getElementById("colour-by");
  const legend = document.getElementById("legend");
  const listeners = [];
  const grids = [];

  // Roles of all models share colours and letters.
  const roleNames = [...new Set(models.flatMap((model) => model.roles.map((role) => role.name)))];
  const letters = new Map();
  for (const name of roleNames) {
    let letter = name[0].toUpperCase();
    const second = name.split(/[ _]/)[1];
    if ([...letters.values()].includes(letter)) letter += second ? second[0] : name[1];
    letters.set(name, letter);
  }
  const roleColour = (name) => parsed(data.roleColours[roleNames.indexOf(name) % data.roleColours.length]);
  const striped = (name) => roleNames.indexOf(name) >= data.roleColours.length;

  const dressRole = (cell, model, head) => {
    const roles = model.rolesOf(head);
    cell.textContent = roles.length ? letters.get(roles[0].name) : "";
    cell.classList.toggle("striped", roles.length > 0 && striped(roles[0].name));
    cell.style.background = "";
    if (!roles.length) return;
    const first = roleColour(roles[0].name);
    const second = roles[1] && rgb(roleColour(roles[1].name));
    cell.style.color = ink(first);
    cell.style.background = second ? `linear-gradient(135deg, ${rgb(first)} 68%, ${second} 68%)` : rgb(first);
  };
  const dressScore = (cell, score, head) => {
    const colour = colourOf(score, head);
    cell.textContent = "";
    cell.classList.remove("striped");
    cell.style.background = colour ? rgb(colour) : "";
  };
  const said = (model, head) => {
    const roles = model.rolesOf(head).map((role) => `${role.name} ${written(role.score.mean[head])}`);
    return `${model.headName(head)}: ${roles.join(", ") || "no role"}`;
  };
  const scoreOf = (model) => model.scores.find((score) => score.name === chooser.value);

  const dress = () => {
    for (const { model, cells } of grids) {
      const score = chooser.value === "" ? null : scoreOf(model);
      for (const [head, cell] of cells) {
        if (chooser.value === "") dressRole(cell, model, head);
        else if (score) dressScore(cell, score, head);
        else dressScore(cell, { mean: [], signed: false, bounds: [0, 1] }, head);
        cell.title = score ? `${model.headName(head)} ${written(score.mean[head])}` : said(model, head);
      }
    }
    legend.replaceChildren(...(chooser.value === "" ? roleLegend() : scoreLegend()));
  };
  const roleLegend = () => {
    const found = roleNames.map((name) => {
      const swatch = element("span", { class: striped(name) ? "swatch striped" : "swatch" }, letters.get(name));
      swatch.style.background = rgb(roleColour(name));
      swatch.style.color = ink(roleColour(name));
      return element("span", {}, swatch, ` ${name.replaceAll("_", " ")}`);
    });
    const none = element("span", {}, element("span", { class: "swatch" }), " no role");
    return [...found, none];
  };
  const scoreLegend = () => {
    const model = models.find(scoreOf);
    const score = scoreOf(model);
    const bar = element("span", { class: "bar" });
    bar.style.background = `linear-gradient(90deg, ${scaleOf(score).map(([, colour]) => colour).join(", ")})`;
    const [low, high] = limits(score);
    return [element("span", {}, written(low), " ", bar, ` ${written(high)} ${score.unit}`), element("span", { class: "quiet" }, score.description)];
  };

  const move = (grid, from, key) => {
    const { model, cells } = grid;
    const width = model.heads;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width }[key];
    let at = from;
    if (key === "Home") at = from - (from % width) - 1;
    if (key === "End") at = from - (from % width) + width;
    const by = step ?? (key === "Home" ? 1 : -1);
    do at += by; while (at >= 0 && at < model.count && !cells.has(at));
    if (cells.has(at)) focus(grid, at);
  };
  const focus = (grid, head) => {
    grid.cells.get(grid.current)?.setAttribute("tabindex", "-1");
    grid.current = head;
    grid.cells.get(head).setAttribute("tabindex", "0");
    grid.cells.get(head).focus();
  };

  const build = (model) => {
    const holder = document.getElementById(`atlas-${model.number}`);
    const table = element("div", { class: "atlas", role: "grid", "aria-label": `Heads of ${model.name}: layers downwards, heads to the right`, "aria-rowcount": model.layers, "aria-colcount": model.heads });
    table.style.setProperty("--heads", model.heads);
    table.classList.toggle("small", model.heads > 24);
    table.classList.toggle("large", model.heads <= 12);
    const grid = { model, cells: new Map(), current: model.shown[0] };
    for (let layer = 0; layer < model.layers; layer += 1) {
      const row = element("div", { role: "row", class: "row" }, element("span", { role: "rowheader", class: "layer" }, model.layers > 24 && layer % 8 ? "" : `${model.letter}${layer}`));
      for (let head = layer * model.heads; head < (layer + 1) * model.heads; head += 1) {
        if (!model.present[head]) {
          row.append(element("span", { role: "gridcell", class: "cell absent", "aria-label": `${model.headName(head)}: not there` }));
          continue;
        }
        const cell = element("button", { type: "button", role: "gridcell", class: "cell", tabindex: head === grid.current ? "0" : "-1", "aria-label": said(model, head), "data-head": head });
        grid.cells.set(head, cell);
        row.append(cell);
      }
      table.append(row);
    }
    table.addEventListener("click", (event) => {
      const head = event.target.dataset.head;
      if (head !== undefined) open(model.number, Number(head));
    });
    table.addEventListener("keydown", (event) => {
      const head = event.target.dataset.head;
      if (head === undefined || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      move(grid, Number(head), event.key);
    });
    holder.append(table);
    grids.push(grid);
  };

  // Show a head's card; who listens is told (model, head, whether to leave the focus).
  const open = (number, head, quietly = false) => {
    for (const grid of grids) grid.cells.forEach((cell) => cell.removeAttribute("aria-selected"));
    const grid = grids[number];
    const cell = grid?.cells.get(head);
    if (!cell) return;
    cell.setAttribute("aria-selected", "true");
    grid.cells.get(grid.current)?.setAttribute("tabindex", "-1");
    grid.current = head;
    cell.setAttribute("tabindex", "0");
    listeners.forEach((listener) => listener(grid.model, head, quietly));
  };
  const back = (number) => grids[number].cells.get(grids[number].current).focus();

  for (const name of [...new Set(models.flatMap((model) => model.scores.map((score) => score.name)))]) {
    chooser.append(element("option", { value: name }, name.replaceAll("_", " ")));
  }
  if (!roleNames.length && chooser.options.length > 1) chooser.selectedIndex = 1;
  models.forEach(build);
  dress();
  chooser.addEventListener("change", dress);
  headscope.dark.addEventListener("change", dress);
  const colour = (name) => { chooser.value = name; dress(); document.getElementById("atlas").scrollIntoView(); };
  return { open, back, colour, onOpen: (listener) => listeners.push(listener), roleColour };
})();
