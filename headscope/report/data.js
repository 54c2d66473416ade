"use strict";
// What every part of the report uses: elements made of text, packed numbers, colours.
const headscope = (() => {
  // An element; strings among the children become text, never markup.
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const drawing = (tag, attributes = {}, ...children) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  // IEEE half precision: sign, 5 bits of exponent, 10 of fraction.
  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction) : sign * fraction * 2 ** -14;
  };
  const unpack = (packed) => {
    if (!packed) return null;
    const raw = bytes(packed.data);
    if (packed.kind === "f4") return new Float32Array(raw.buffer);
    if (packed.kind === "u2") return new Uint16Array(raw.buffer);
    if (packed.kind === "f2") return Float32Array.from(new Uint16Array(raw.buffer), half);
    return raw;
  };

  // At most seven characters, as in the package's own tables.
  const written = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 10000)) return value.toExponential(0).replace("e+", "e");
    return value.toFixed(size < 0.1 ? 3 : size < 100 ? 2 : 0);
  };

  const parsed = (colour) => colour.startsWith("#")
    ? [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16))
    : colour.match(/\d+/g).slice(0, 3).map(Number);
  // The colour at a place in [0, 1] of a scale of [place, colour].
  const along = (scale, at) => {
    const end = Math.max(1, scale.findIndex(([place]) => place >= at));
    const [[x, a], [y, b]] = [scale[end - 1], scale[end]];
    const part = y > x ? (at - x) / (y - x) : 0;
    const [from, to] = [parsed(a), parsed(b)];
    return from.map((value, i) => Math.round(value + part * (to[i] - value)));
  };
  const rgb = (colour) => `rgb(${colour.join(" ")})`;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => (dark.matches ? "dark" : "light");
  // Black or white, whichever reads better on a colour.
  const ink = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff");

  const data = JSON.parse(document.getElementById("figures").textContent);
  const models = data.models.map((model, number) => {
    const scores = model.scores.map((score) => ({
      ...score,
      ...Object.fromEntries(
        ["mean", "sem", "null", "p", "low", "high"].map((name) => [name, unpack(score[name])]),
      ),
    }));
    const roles = model.roles.map((role) => ({ ...role, heads: new Set(role.heads), score: scores[role.score] }));
    const count = model.layers * model.heads;
    const present = unpack(model.present);
    const shown = [...Array(count).keys()].filter((head) => present[head]);
    const name = (head) => `${model.letter}${Math.floor(head / model.heads)}H${head % model.heads}`;
    const rolesOf = (head) => roles.filter((role) => role.heads.has(head));
    return { ...model, number, scores, roles, count, present, shown, headName: name, rolesOf };
  });
  const limits = (score) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of score.mean) if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    if (low > high) return [0, 1];
    if (score.signed) {
      const reach = Math.max(Math.abs(low), Math.abs(high)) || 1;
      return [-reach, reach];
    }
    low = score.bounds[0] ?? low;
    high = score.bounds[1] ?? high;
    return high > low ? [low, high] : [low, low + 1];
  };
  const scaleOf = (score) => (score.signed ? data.scales.diverging[theme()] : data.scales.sequential);
  const colourOf = (score, head) => {
    const value = score.mean[head];
    if (!Number.isFinite(value)) return null;
    const [low, high] = limits(score);
    return along(scaleOf(score), Math.min(1, Math.max(0, (value - low) / (high - low))));
  };
  return { element, drawing, unpack, written, along, parsed, rgb, ink, dark, theme, data, models, limits, scaleOf, colourOf };
})();
