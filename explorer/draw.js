// Charts as SVG. Each is drawn for the width that it gets, and again when that changes.
import { cut, h, number, percent, quoted, s, visible } from "./dom.js";

export function chart(draw) {
  const box = h("div", { class: "chart" });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const found = Math.round(entry.contentRect.width);
    if (found && found !== width) box.replaceChildren(draw((width = found)));
  }).observe(box);
  return box;
}

const ROW = 24;

function button(label, action) {
  if (!action) return { "aria-label": label };
  const key = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); action(); } };
  return { role: "button", tabindex: 0, "aria-label": label, onclick: action, onkeydown: key };
}

// Terms in nats that sum up, each beginning where the last one ended. rows: {label, hint, value, before, control, open}
export function waterfall(rows) {
  return chart((width) => {
    const left = width < 480 ? 120 : 190, right = 62, room = width - left - right;
    let low = 0, high = 0, total = 0;
    for (const row of rows) {
      row.from = row.whole ? 0 : total;
      row.to = row.whole ? row.value : (total += row.value);
      row.was = row.before === undefined ? null : row.from + row.before;
      low = Math.min(low, row.to, row.was ?? 0);
      high = Math.max(high, row.to, row.was ?? 0);
    }
    const x = (value) => left + (room * (value - low)) / (high - low || 1);
    const bars = rows.map((row, i) => {
      const y = i * ROW, [a, b] = [x(row.from), x(row.to)];
      const label = `${row.label} ${row.hint ?? ""}: ${number(row.value, 3)} nats`;
      return s("g", { class: "bar", ...button(label, row.open) },
        s("title", {}, label),
        s("rect", { class: "hover", x: 0, y, width, height: ROW }),
        s("text", { x: 0, y: y + 16 }, row.label,
          s("tspan", { class: "dim", dx: 8 }, cut(row.hint ?? "", Math.max(0, Math.floor((left - 12 - 8 * row.label.length) / 8.6))))),
        row.control && s("rect", { class: "control", x: Math.min(a, x(row.from + Math.sign(row.value) * row.control)), y: y + 17,
          width: Math.abs(x(row.from + row.control) - x(row.from)), height: 3 }),
        s("rect", { class: row.value < 0 ? "minus" : "plus", x: Math.min(a, b), y: y + 4, width: Math.max(1, Math.abs(b - a)), height: 12 }),
        row.was !== null && s("line", { class: "was", x1: x(row.was), x2: x(row.was), y1: y + 2, y2: y + 18 }),
        s("text", { class: "value", x: width, y: y + 16, "text-anchor": "end" }, number(row.value, 3)));
    });
    return s("svg", { viewBox: `0 0 ${width} ${rows.length * ROW}`, role: "group" },
      s("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: rows.length * ROW }), bars);
  });
}

// Horizontal bars from zero. rows: {label, hint, value, before, text, open, on}
export function bars(rows) {
  return chart((width) => {
    const left = width < 480 ? 110 : 150, right = 12 + 7.6 * Math.max(...rows.map((row) => row.text.length), 4), room = width - left - right;
    const low = Math.min(0, ...rows.map((row) => Math.min(row.value, row.before ?? 0)));
    const high = Math.max(1e-12, ...rows.map((row) => Math.max(row.value, row.before ?? 0)));
    const x = (value) => left + (room * (value - low)) / (high - low || 1);
    return s("svg", { viewBox: `0 0 ${width} ${rows.length * ROW}`, role: "group" }, rows.map((row, i) => {
      const y = i * ROW;
      const label = `${row.label} ${row.hint ?? ""}: ${row.text}`;
      return s("g", { class: "bar", ...button(label, row.open) },
        s("title", {}, label),
        s("rect", { class: "hover", x: 0, y, width, height: ROW }),
        s("text", { x: 0, y: y + 16, "font-weight": row.on ? 700 : 400 }, cut(visible(row.label), width < 480 ? 12 : 20),
          row.hint && s("tspan", { class: "dim", dx: 6 }, cut(row.hint, Math.max(0, Math.floor((left - 16) / 8.6) - row.label.length)))),
        s("rect", { class: row.value < 0 ? "minus" : "plus", x: Math.min(x(0), x(row.value)), y: y + 4,
          width: Math.max(1, Math.abs(x(row.value) - x(0))), height: 13 }),
        row.before !== undefined && s("line", { class: "was", x1: x(row.before), x2: x(row.before), y1: y + 2, y2: y + 19 }),
        s("text", { class: "value", x: width, y: y + 16, "text-anchor": "end" }, row.text));
    }));
  });
}

export function likely(rows, target, pick) {
  return bars(rows.map((row) => ({
    label: row.text, value: row.p, before: row.before, text: percent(row.p), on: row.id === target, open: () => pick(row.id),
  })));
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

// Layers x positions, with the arrow keys as well; it opens where `here` is. rows: [[text or null, value]] from the lowest layer up
export function heatMap({ rows, first }, tokens, here, pick) {
  const box = h("div", { class: "scroll" }, chart((width) => {
    const signed = rows[0][0][0] === null, n = rows[0].length, left = 40;
    const cell = Math.max(signed ? 28 : 62, (width - left) / n), most = Math.max(...rows.flat().map(([, value]) => Math.abs(value)), 1e-9);
    const size = signed ? 20 : 22, total = left + cell * n;
    const parts = rows.map((row, layer) => {
      const y = (rows.length - 1 - layer) * size;
      return [s("text", { class: "dim", x: 0, y: y + 15 }, layer === rows.length - 1 ? "end" : String(layer)), row.map(([text, value], i) => {
        const at = first + i, strength = signed ? Math.abs(value) / most : value;
        const label = `layer ${layer}, token ${at} ${tokens[at].text}: ${text === null ? number(value) : quoted(text) + " " + percent(value)}`;
        const hue = signed && value < 0 ? "--hot" : "--cool";
        return [s("rect", { class: "cell" + (at === here.position && layer === here.layer ? " here" : ""), x: left + i * cell, y, width: cell, height: size,
          "data-layer": layer, "data-position": at, style: { fill: `rgb(var(${hue}) / ${(0.06 + 0.74 * strength).toFixed(3)})` }, onclick: () => pick(at, layer) },
          s("title", {}, label)),
          text !== null && s("text", { class: "over", x: left + i * cell + 4, y: y + 15 }, cut(visible(text), Math.floor((cell - 6) / 6.7)))];
      })];
    });
    const names = tokens.slice(first, first + n).map((token, i) =>
      s("text", { class: "dim over", x: left + i * cell + 4, y: rows.length * size + 15 }, cut(visible(token.text), Math.floor((cell - 6) / 6.5))));
    const height = rows.length * size + 20;
    const move = (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      const within = (x, least, most) => Math.min(most, Math.max(least, x));
      pick(within(here.position + step[0], first, first + n - 1), within(here.layer + step[1], 0, rows.length - 1));
    };
    queueMicrotask(() => { box.scrollLeft = left + (here.position - first + 0.5) * cell - width / 2; }); // when it is in the page
    return s("svg", { viewBox: `0 0 ${total} ${height}`, tabindex: 0, role: "group", "aria-label": "layers by positions; the arrow keys move", onkeydown: move, style: { width: `${total}px`, height: `${height}px` } }, parts, names);
  }));
  return box;
}

export function histogram([low, high, counts]) {
  return chart((width) => {
    const height = 70, most = Math.max(...counts), step = width / counts.length, x = (value) => (width * (value - low)) / (high - low || 1);
    return s("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `activations from ${number(low)} to ${number(high)}` },
      counts.map((count, i) => s("rect", { class: low + (i + 0.5) * (high - low) / counts.length < 0 ? "minus" : "plus", x: i * step + 0.5,
        y: height - (height * count) / most, width: step - 1, height: (height * count) / most })),
      s("text", { class: "dim", x: 0, y: height + 14 }, number(low)),
      low < 0 && high > 0 && s("text", { class: "dim", x: x(0), y: height + 14, "text-anchor": "middle" }, "0"),
      s("text", { class: "dim", x: width, y: height + 14, "text-anchor": "end" }, number(high)));
  });
}

// Curves over steps, [[[step, value]]], the second one in another colour.
export function curves(lines, label) {
  return chart((width) => {
    const height = 110, points = lines.flat(), xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
    const [low, high, last] = [Math.min(...ys), Math.max(...ys), Math.max(...xs, 1)];
    const place = ([x, y]) => `${(width * x) / last},${4 + ((height - 8) * (high - y)) / (high - low || 1)}`;
    return s("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `${label} from ${number(low)} to ${number(high)}` },
      s("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }),
      lines.map((line, i) => s("polyline", { class: i ? "curve b" : "curve", points: line.map(place).join(" ") })),
      s("text", { class: "dim", x: width, y: 12, "text-anchor": "end" }, `highest ${number(high, 3)}`),
      s("text", { class: "dim", x: 0, y: height + 14 }, `lowest ${number(low, 3)}`),
      s("text", { class: "dim", x: width, y: height + 14, "text-anchor": "end" }, `step ${last.toLocaleString("en")}`));
  });
}
