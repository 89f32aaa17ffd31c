// Charts, drawn as SVG whose colours are the style sheet's.
import { draw, make } from "./dom.js";
import { bytes, percent, rate } from "./units.js";

const WIDTH = 320;
const HEIGHT = 96;
const LEFT = 34; // of numbers beside the lines
const BOTTOM = 16; // of seconds below them

/** Draw `values`, one a second with the newest last, over `seconds`. */
export function drawLine(node, values, seconds) {
  const recent = values.slice(-seconds);
  const top = ceiling(Math.max(...recent, 1));
  const x = (i) => WIDTH - ((recent.length - 1 - i) * (WIDTH - LEFT)) / (seconds - 1);
  const y = (v) => 6 + (1 - v / top) * (HEIGHT - BOTTOM - 6);
  const parts = [];
  for (const v of [0, top / 2, top]) {
    parts.push(draw("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(v), y2: y(v) }));
    parts.push(draw("text", { x: LEFT - 6, y: y(v) + 3.5, "text-anchor": "end" }, tick(v)));
  }
  const times = [[LEFT, "start", `${seconds} s ago`], [WIDTH, "end", "now"]];
  for (const [at, anchor, label] of times) {
    parts.push(draw("text", { x: at, y: HEIGHT - 2, "text-anchor": anchor }, label));
  }
  if (recent.length) {
    const points = recent.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`);
    const area = `${x(0).toFixed(1)},${y(0)} ${points.join(" ")} ${WIDTH},${y(0)}`;
    parts.push(draw("polygon", { class: "area", points: area }));
    parts.push(draw("polyline", { class: "line", points: points.join(" ") }));
  }
  node.replaceChildren(draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}` }, ...parts));
  const mean = recent.reduce((sum, v) => sum + v, 0) / Math.max(recent.length, 1);
  const span = `the last ${recent.length} seconds`;
  node.setAttribute("aria-label", `Tokens per second over ${span}: ${rate(mean)} on average`);
}

/** The next of 1, 2, 5, 10, … from `n` on. */
function ceiling(n) {
  const power = 10 ** Math.floor(Math.log10(n));
  return power * [1, 2, 5, 10].find((step) => step * power >= n);
}

function tick(v) {
  return v >= 1000 ? `${v / 1000}k` : String(v);
}

/**
 * Draw a bar of `parts`, [name, label, amount] each, as long as `total`, and the legend of those
 * that are there. The style sheet colours them by their names.
 */
export function drawStack(bar, legend, parts, total) {
  let at = 0;
  const pieces = [];
  const rows = [];
  for (const [name, label, amount] of parts.filter((part) => part[2] > 0)) {
    const size = (100 * amount) / Math.max(total, 1);
    pieces.push(draw("rect", { class: `kind-${name}`, x: at, y: 0, width: size, height: 10 }));
    at += size;
    const value = make("span", { class: "value" }, bytes(amount));
    rows.push(make("li", {}, make("i", { class: `kind-${name}` }), make("span", {}, label), value));
  }
  const box = { viewBox: "0 0 100 10", preserveAspectRatio: "none" };
  bar.replaceChildren(draw("svg", box, ...pieces));
  bar.setAttribute("aria-label", `Memory by kind, ${bytes(total)} in all`);
  legend.replaceChildren(...rows);
}

/**
 * Draw a cell for each of `layers`, {layer, rate, reads}; a rate of null is of a layer unused.
 * Returns what the map says in short.
 */
export function drawHeat(node, layers) {
  node.replaceChildren(...layers.map(heatCell));
  const known = layers.filter((one) => one.rate !== null);
  const lowest = known.reduce((a, b) => (a && a.rate <= b.rate ? a : b), null);
  const short = lowest ? `Lowest: layer ${lowest.layer}, ${percent(lowest.rate)}` : "None used yet";
  node.setAttribute("aria-label", `Hit rates of ${layers.length} layers. ${short}`);
  return short;
}

function heatCell({ layer, rate: share, reads }) {
  if (share === null) {
    return make("span", { class: "cell unused", title: `Layer ${layer}: not used yet` }, `${layer}`);
  }
  const tone = share > 0.85 ? "high" : share > 0.65 ? "middle" : "low"; // which text stands out
  const title = `Layer ${layer}: ${percent(share)} found in memory, ${reads} read from disk`;
  const cell = make("span", { class: `cell ${tone}`, title }, `${layer}`);
  cell.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
  return cell;
}
