"use strict";
// Every head in a table: sorted by any column, filtered, in pages of 200 rows.
(() => {
  const { element, written, models, atlas, data } = headscope;
  const holder = document.getElementById("heads-table");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const picker = document.getElementById("columns");
  const PAGE = 200;
  const names = [...new Set(models.flatMap((model) => model.scores.map((score) => score.name)))];
  const chosen = new Set(names.slice(0, data.columns));
  const all = models.flatMap((model) => model.shown.map((head) => ({ model, head })));
  const byName = models.map((model) => new Map(model.scores.map((score) => [score.name, score])));
  const valueOf = (row, column) => byName[row.model.number].get(column)?.mean[row.head] ?? NaN;
  const state = { column: "", down: false, rows: all, shown: PAGE };

  // "induction > 0.5", "L5", "L5H1", a role's name, or a model's.
  const test = (text) => {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return () => true;
    const compared = /^(.+?)\s*([<>])=?\s*(-?[\d.]+)$/.exec(wanted);
    if (compared) {
      const column = names.find((name) => name.toLowerCase().replaceAll("_", " ") === compared[1].replaceAll("_", " "));
      const [bound, above] = [Number(compared[3]), compared[2] === ">"];
      return column ? (row) => (above ? valueOf(row, column) >= bound : valueOf(row, column) <= bound) : () => false;
    }
    if (/^l\d+$/.test(wanted)) return ({ model, head }) => model.headName(head).toLowerCase().startsWith(`${wanted}h`);
    if (/^l\d+h\d*$/.test(wanted)) return ({ model, head }) => { const name = model.headName(head).toLowerCase(); return wanted.endsWith("h") ? name.startsWith(wanted) : name === wanted; };
    return ({ model, head }) => model.rolesOf(head).some((role) => role.name.replaceAll("_", " ").includes(wanted.replaceAll("_", " "))) || (models.length > 1 && model.name.toLowerCase().includes(wanted));
  };
  // Missing values come last in both directions; ties keep the heads' order.
  const arrange = () => {
    const rows = all.filter(test(filter.value));
    const { column, down } = state;
    if (column === "") { if (down) rows.reverse(); } else {
      rows.sort((a, b) => {
        const [x, y] = [valueOf(a, column), valueOf(b, column)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return (down ? y - x : x - y) || a.model.number - b.model.number || a.head - b.head;
      });
    }
    state.rows = rows;
    state.shown = PAGE;
    draw();
  };
  const sortBy = (column) => {
    state.down = state.column === column ? !state.down : column !== "";
    state.column = column;
    arrange();
    holder.querySelector("th[aria-sort] button").focus();
  };
  const cell = (row, column) => {
    const score = byName[row.model.number].get(column);
    const value = valueOf(row, column);
    const made = element("td", {}, written(value));
    if (score && Number.isFinite(value)) {
      const [low, high] = headscope.limits(score);
      made.style.setProperty("--s", `${Math.round(100 * Math.min(1, Math.max(0, (value - low) / (high - low))))}%`);
      if (row.model.roles.some((role) => role.score === score && role.heads.has(row.head))) made.className = "marked";
    }
    return made;
  };
  const heading = (column, text, unit, title) => element("th", { scope: "col", title, "aria-sort": state.column === column ? (state.down ? "descending" : "ascending") : null },
    element("button", { type: "button", onclick: () => sortBy(column) }, text), unit ? element("small", {}, unit) : null);
  const draw = () => {
    const columns = names.filter((name) => chosen.has(name));
    const first = (name) => models.map((model) => byName[model.number].get(name)).find(Boolean);
    const heads = [heading("", "head"), models.length > 1 ? element("th", { scope: "col", class: "words" }, "model") : null, element("th", { scope: "col", class: "words" }, "roles"),
      ...columns.map((name) => heading(name, name.replaceAll("_", " "), first(name).unit, first(name).description))];
    const rows = state.rows.slice(0, state.shown).map((row) => element("tr", {},
      element("th", { scope: "row" }, element("button", { type: "button", class: "link", onclick: () => { atlas.open(row.model.number, row.head); document.getElementById("card").scrollIntoView({ block: "nearest" }); } }, row.model.headName(row.head))),
      models.length > 1 ? element("td", { class: "words" }, row.model.name) : null,
      element("td", { class: "words" }, row.model.rolesOf(row.head).map((role) => role.name.replaceAll("_", " ")).join(", ")),
      ...columns.map((name) => cell(row, name))));
    holder.replaceChildren(element("caption", { class: "quiet" }, "Mean of each score. Bold: the head has this role. Choose a column head to sort by it, a head to open its card."),
      element("thead", {}, element("tr", {}, ...heads.filter(Boolean))), element("tbody", {}, ...rows));
    count.textContent = `${state.rows.length} heads`;
    more.hidden = state.rows.length <= state.shown;
  };
  picker.append(...names.map((name) => {
    const box = element("input", { type: "checkbox", onchange: () => { box.checked ? chosen.add(name) : chosen.delete(name); draw(); } });
    box.checked = chosen.has(name);
    return element("label", {}, box, ` ${name.replaceAll("_", " ")}`);
  }));
  more.addEventListener("click", () => { state.shown += PAGE; draw(); });
  filter.addEventListener("input", arrange);
  arrange();
})();
