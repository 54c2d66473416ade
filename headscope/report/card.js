"use strict";
// What is known of one head, put together when it is chosen.
(() => {
  const { element, drawing, unpack, written, models, atlas, rgb, ink, parsed, data } = headscope;
  const card = document.getElementById("card");

  const table = (caption, columns, rows) => rows.length === 0 ? null : element(
    "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", { class: "quiet" }, caption),
      element("thead", {}, element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...rows)),
  );
  const part = (title, ...blocks) => {
    const there = blocks.filter((block) => block !== null);
    return there.length ? [element("h4", {}, title), ...there] : [];
  };

  const rank = (score, head) => {
    let above = 0;
    let known = 0;
    for (const value of score.mean) {
      known += Number.isFinite(value);
      above += value > score.mean[head];
    }
    return `${above + 1}/${known}`;
  };
  const interval = (score, head) => {
    if (score.low && Number.isFinite(score.low[head])) return `${written(score.low[head])} to ${written(score.high[head])}`;
    const width = score.sem ? 1.96 * score.sem[head] : NaN;
    return Number.isFinite(width) ? `${written(score.mean[head] - width)} to ${written(score.mean[head] + width)}` : "–";
  };
  const p = (score, head) => {
    const value = score.p ? score.p[head] : NaN;
    return Number.isFinite(value) && value < 1e-6 ? "<1e-6" : written(value);
  };
  const scoreRows = (model, head, kind) => model.scores
    .filter((score) => score.kind === kind && Number.isFinite(score.mean[head]))
    .map((score) => {
      const marked = model.roles.some((role) => role.score === score && role.heads.has(head));
      return element("tr", marked ? { class: "marked" } : {},
        element("th", { scope: "row", title: score.description }, score.name.replaceAll("_", " "), score.unit ? element("small", {}, ` ${score.unit}`) : ""),
        ...[`${written(score.mean[head])}`, interval(score, head), written(score.null?.[head]), p(score, head), rank(score, head)]
          .map((text) => element("td", {}, text)));
    });
  const columns = ["score", "mean", "95%", "null", "p, adjusted", "rank"];

  const tokens = (list) => list.map((token) => element("span", { class: "token" }, token));
  const spaced = (list) => list.flatMap((one) => [one, " "]);
  const directions = (circuit, found) => found.flatMap((direction, number) => [0, 1].map((sign) => element("tr", {},
    element("th", { scope: "row" }, sign ? "" : `${circuit} ${number + 1} (${written(direction.size)})`),
    element("td", { class: "words" }, ...spaced(tokens(direction.reads[sign]))),
    element("td", { class: "words" }, ...spaced(tokens(direction.writes[sign]))))));

  const partners = (model, head) => {
    if (!model.partners) return null;
    const rows = model.partners.modes.flatMap(({ name, fedBy, feeds }) => [["fed by", fedBy], ["feeds", feeds]].map(([way, side]) => {
      const width = model.partners.width;
      const links = [];
      for (let at = head * width; at < (head + 1) * width; at += 1) {
        const [other, value] = [side.which[at], side.value[at]];
        if (!(value > 0)) continue;
        links.push(element("button", { type: "button", class: "link", onclick: () => atlas.open(model.number, other) }, model.headName(other)), ` ${written(value)} `);
      }
      return links.length ? element("tr", {}, element("th", { scope: "row" }, `${way}, ${name}`), element("td", { class: "words" }, ...links)) : null;
    })).filter(Boolean);
    return table("Composition, strongest first; Q, K, V: read by queries, keys, values", ["", "heads"], rows);
  };

  const spectrum = (model, head) => {
    const drawn = model.spectra.flatMap((one) => {
      const ranks = one.low.length;
      const values = one.values.subarray(head * ranks, (head + 1) * ranks);
      if (!Number.isFinite(values[0])) return [];
      const most = Math.max(1.2, ...values, ...one.high);
      const [x, y] = [(at) => 8 + (184 * at) / Math.max(1, ranks - 1), (value) => 96 - (86 * Math.max(0, value)) / most];
      const band = [...[...one.high].map((value, at) => `${x(at)},${y(value)}`), ...[...one.low].map((value, at) => `${x(at)},${y(value)}`).reverse()];
      const label = `${one.name}: largest ${written(values[0])} in units of chance, ${[...values].filter((value, at) => value > one.high[at]).length} of ${ranks} above chance`;
      const picture = drawing("svg", { viewBox: "0 0 200 100", role: "img", "aria-label": label, class: "spectrum" },
        drawing("polygon", { points: band.join(" "), class: "band" }),
        drawing("polyline", { points: [...values].map((value, at) => `${x(at)},${y(value)}`).join(" "), class: "curve" }));
      return [element("figure", {}, picture, element("figcaption", { class: "quiet" }, label))];
    });
    return drawn.length ? element("div", { class: "maps" }, ...drawn, element("p", { class: "quiet" }, "Grey: random factors of the same shape and variance.")) : null;
  };

  const attention = (model, head) => {
    if (!model.attention) return null;
    const { tokens: texts, place, triangle, pattern, words } = model.attention;
    const which = place.get(head);
    if (which === undefined) return null;
    const size = texts.length;
    const each = triangle ? (size * (size + 1)) / 2 : size * size;
    const start = which * each;
    const at = triangle
      ? (query, key) => (key > query ? 0 : pattern[start + (query * (query + 1)) / 2 + key])
      : (query, key) => pattern[start + query * size + key];
    const holder = element("div", {});
    attentionView.line(holder, texts, at, parsed(data.accent[headscope.theme()]), `Attention of ${model.headName(head)}`);
    holder.append(element("p", { class: "quiet" }, words));
    return holder;
  };

  for (const model of models) {
    for (const one of model.spectra) for (const name of ["values", "low", "high"]) one[name] = unpack(one[name]);
    for (const mode of model.partners?.modes ?? []) {
      for (const side of [mode.fedBy, mode.feeds]) [side.which, side.value] = [unpack(side.which), unpack(side.value)];
    }
    if (model.attention) {
      model.attention.pattern = unpack(model.attention.pattern);
      model.attention.place = new Map(model.attention.heads.map((head, at) => [head, at]));
    }
  }

  const show = (model, head, quietly) => {
    const name = model.headName(head);
    const words = model.words[name] ?? {};
    const says = model.says[name];
    const chips = model.rolesOf(head).map((role) => {
      const chip = element("span", { class: "chip" }, role.name.replaceAll("_", " "));
      [chip.style.background, chip.style.color] = [rgb(atlas.roleColour(role.name)), ink(atlas.roleColour(role.name))];
      return chip;
    });
    const close = element("button", { type: "button", class: "close", "aria-label": "Close the card", onclick: hide }, "✕");
    const group = model.heads / model.kvHeads;
    const subtitle = [models.length > 1 ? model.name : "", group > 1 ? `key/value head ${Math.floor((head % model.heads) / group)}` : ""].filter(Boolean).join(", ");
    card.replaceChildren(
      close,
      element("h3", { tabindex: "-1" }, name, " ", ...spaced(chips)),
      element("p", { class: "quiet" }, subtitle || (chips.length ? "" : "No role.")),
      ...part("Attention", attention(model, head)),
      ...part("On probes", table("Scores; bold: the role is this head's", columns, scoreRows(model, head, "probe"))),
      ...part("Ablation", table("What editing this head alone changes", columns, scoreRows(model, head, "effect"))),
      ...part("What it reads and writes",
        table("Largest singular directions: a token read raises those written beside it (OV); a query looks for the keys beside it (QK)", ["direction", "reads / query", "writes / key"],
          Object.entries(words).flatMap(([circuit, found]) => directions(circuit, found))),
        says ? element("p", {}, "On the lens prompt it promotes ", ...spaced(tokens(says[0])), " and suppresses ", ...spaced(tokens(says[1]))) : null),
      ...part("Composition partners", partners(model, head)),
      ...part("Spectrum", spectrum(model, head)),
      ...part("Weights", table("Scores of weights alone", columns, scoreRows(model, head, "weights"))),
    );
    card.dataset.head = name;
    card.dataset.model = model.number;
    card.hidden = false;
    document.getElementById("hint").hidden = true;
    if (quietly) return;
    card.querySelector("h3").focus({ preventScroll: matchMedia("(min-width: 1000px)").matches });
    try { history.replaceState(null, "", `#${model.number}-${name}`); } catch { /* some hosts forbid it */ }
  };
  const hide = () => {
    card.hidden = true;
    document.getElementById("hint").hidden = false;
    atlas.back(Number(card.dataset.model));
  };
  card.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  atlas.onOpen(show);

  // A link to a head, such as report.html#0-L5H1; else the strongest head of the first role.
  const asked = /^#(\d+)-L(\d+)H(\d+)$/.exec(location.hash);
  const [first] = models.flatMap((model) => model.roles.map((role) => [model, role]));
  if (asked && models[asked[1]]) atlas.open(Number(asked[1]), asked[2] * models[asked[1]].heads + Number(asked[3]));
  else if (first && matchMedia("(min-width: 1000px)").matches) atlas.open(first[0].number, [...first[1].heads][0], true);
})();
