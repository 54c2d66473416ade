"use strict";
// One head's attention on one text: tokens in a line and the pattern as a picture.
// pattern(query, key) is in 0..255.
const attentionView = (() => {
  const make = (tag, attributes, text) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const short = (text) => (text.length > 40 ? `${text.slice(0, 39)}…` : text);

  // The pattern, one pixel a cell, queries downwards.
  const paint = (canvas, size, pattern, colour) => {
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    const image = context.createImageData(size, size);
    const pixels = new Uint32Array(image.data.buffer);
    const ground = colour[0] | (colour[1] << 8) | (colour[2] << 16); // little-endian: R, G, B, A
    for (let query = 0, at = 0; query < size; query += 1) {
      for (let key = 0; key < size; key += 1, at += 1) pixels[at] = ground | (pattern(query, key) << 24);
    }
    context.putImageData(image, 0, 0);
  };

  // Without the first token, usually a sink: each row is divided by what the others get.
  const sums = new WeakMap();
  const noSink = (pattern, size) => {
    if (!sums.has(pattern)) {
      sums.set(pattern, Array.from({ length: size }, (_, query) => {
        let sum = 0;
        for (let key = 1; key < size; key += 1) sum += pattern(query, key);
        return sum;
      }));
    }
    const rest = sums.get(pattern);
    return (query, key) => (key && rest[query] ? Math.round((255 * pattern(query, key)) / rest[query]) : 0);
  };
  let hidden = false; // kept from head to head

  // Returns a way to show another head's pattern in the same place; told(query, reverse, as) is
  // called whenever another token is chosen; as(pattern) is how a pattern is shown now.
  const line = (parent, tokens, pattern, colour, label, told = () => {}) => {
    const size = tokens.length;
    let query = size - 1;
    let pinned = false;
    let reverse = false;
    const words = make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": `${label}: choose a token with the arrow keys` });
    const spans = tokens.map((token, at) => {
      const span = make("span", { class: "word", title: `${at} ${token.slice(0, 200)}` }, short(token));
      span.dataset.at = at;
      return span;
    });
    words.append(...spans);
    const said = make("p", { class: "quiet", role: "status" });
    const turn = make("button", { type: "button", "aria-pressed": "false" }, "who looks at it");
    const hide = make("input", { type: "checkbox" });
    const hider = make("label", { class: "hider", title: "and divide the rest of each row by its sum" });
    hide.checked = hidden;
    hider.append(hide, " hide first token");
    const canvas = make("canvas", { role: "img", "aria-label": `${label}: pattern, queries downwards, keys to the right`, class: "pattern" });
    const marker = make("div", { class: "marker" });
    const frame = make("div", { class: "frame" });
    frame.append(canvas, marker);

    const as = (one) => (hidden ? noSink(one, size) : one);
    let seen = as(pattern);
    const strength = (at) => (reverse ? seen(at, query) : seen(query, at));
    const show = () => {
      const row = spans.map((_, at) => strength(at));
      spans.forEach((span, at) => {
        span.style.backgroundColor = row[at] ? `rgb(${colour.join(" ")} / ${row[at] / 255})` : "";
        span.style.color = row[at] > 150 ? "#fff" : "";
        span.classList.toggle("chosen", at === query);
      });
      const best = row.map((value, at) => [value, at]).filter(([value]) => value > 2)
        .sort((a, b) => b[0] - a[0]).slice(0, 3);
      const strongest = best.map(([value, at]) => `${(value / 255).toFixed(2)} ${reverse ? "from" : "to"} ${at} ${short(tokens[at])}`);
      const parked = hidden && !reverse ? ` (${(pattern(query, 0) / 255).toFixed(2)} to the first, hidden)` : "";
      said.textContent = `${query} ${short(tokens[query])}: ${strongest.join(", ") || "nothing"}${parked}`;
      marker.style.top = `${(100 * query) / size}%`;
      marker.style.height = `${100 / size}%`;
      told(query, reverse, as);
    };
    const draw = () => {
      seen = as(pattern);
      paint(canvas, size, seen, colour);
      show();
    };
    const choose = (at) => { query = at; show(); };
    const under = (event) => event.target.dataset?.at;
    words.addEventListener("mouseover", (event) => {
      if (!pinned && under(event) !== undefined) choose(Number(under(event)));
    });
    words.addEventListener("click", (event) => {
      if (under(event) === undefined) return;
      const at = Number(under(event));
      pinned = !(pinned && at === query);
      choose(at);
    });
    words.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      pinned = true;
      choose(Math.min(size - 1, Math.max(0, query + step)));
    });
    frame.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      if (!pinned) choose(Math.min(size - 1, Math.max(0, Math.floor((size * (event.clientY - box.top)) / box.height))));
    });
    turn.addEventListener("click", () => {
      reverse = !reverse;
      turn.setAttribute("aria-pressed", String(reverse));
      show();
    });
    hide.addEventListener("change", () => {
      hidden = hide.checked;
      draw();
    });
    const holder = make("div", { class: "attention" });
    holder.append(frame, words);
    parent.append(holder, said, turn, hider);
    draw();
    return (next, name) => {
      pattern = next;
      words.setAttribute("aria-label", `${name}: choose a token with the arrow keys`);
      canvas.setAttribute("aria-label", `${name}: pattern, queries downwards, keys to the right`);
      draw();
    };
  };
  return { line, paint, short };
})();
