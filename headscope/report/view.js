"use strict";
// The viewer of a notebook: thumbnails of heads, and the chosen one's attention on the text.
(() => {
  const THUMB = 48;
  const data = JSON.parse(document.getElementById("figures").textContent);
  const raw = Uint8Array.from(atob(data.pattern.data), (letter) => letter.charCodeAt(0));
  const size = data.tokens.length;
  const each = data.triangle ? (size * (size + 1)) / 2 : size * size;
  const patterns = data.heads.map((_, which) => {
    const mine = raw.subarray(which * each, (which + 1) * each);
    return data.triangle
      ? (query, key) => (key > query ? 0 : mine[(query * (query + 1)) / 2 + key])
      : (query, key) => mine[query * size + key];
  });
  const colour = matchMedia("(prefers-color-scheme: dark)").matches ? [90, 169, 230] : [42, 111, 176];

  const strip = document.getElementById("heads");
  const block = Math.max(1, Math.ceil(size / THUMB));
  // The largest of a block of cells, so that a single bright cell is not lost.
  const small = (pattern) => (query, key) => {
    let most = 0;
    for (let i = query * block; i < Math.min(size, (query + 1) * block); i += 1) {
      for (let j = key * block; j < Math.min(size, (key + 1) * block); j += 1) most = Math.max(most, pattern(i, j));
    }
    return most;
  };
  const buttons = data.heads.map((name, which) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "thumb";
    const canvas = document.createElement("canvas");
    canvas.setAttribute("aria-hidden", "true");
    attentionView.paint(canvas, Math.ceil(size / block), small(patterns[which]), colour);
    const title = document.createElement("b");
    title.textContent = name;
    const note = document.createElement("small");
    button.append(canvas, title, note);
    button.addEventListener("click", () => choose(which));
    strip.append(button);
    return { button, note };
  });
  // Below each thumbnail: where that head looks from the chosen token.
  const told = (query, reverse, as) => buttons.forEach(({ note }, which) => {
    const seen = as(patterns[which]);
    let [best, at] = [-1, 0];
    for (let other = 0; other < size; other += 1) {
      const value = reverse ? seen(other, query) : seen(query, other);
      if (value > best) [best, at] = [value, other];
    }
    note.textContent = best > 2 ? `${(best / 255).toFixed(2)} ${reverse ? "from" : "to"} ${at} ${attentionView.short(data.tokens[at])}` : "nothing";
  });
  const change = attentionView.line(document.getElementById("view"), data.tokens, patterns[0], colour, `Attention of ${data.heads[0]}`, told);
  const choose = (which) => {
    buttons.forEach(({ button }, other) => button.setAttribute("aria-pressed", String(other === which)));
    change(patterns[which], `Attention of ${data.heads[which]}`);
  };
  strip.hidden = data.heads.length === 1;
  choose(0);
})();
