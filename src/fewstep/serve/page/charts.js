// Small charts as SVG. Each one has its figure as text beside it; a chart alone says nothing to a screen reader.

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [240, 48];

function draw(svg, name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  svg.append(element);
  return element;
}

function blank(svg) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
}

function limit(svg, value, most) {
  if (!value) return;
  const y = HEIGHT - (value / most) * (HEIGHT - 2);
  draw(svg, "line", { x1: 0, x2: WIDTH, y1: y, y2: y, class: "limit" });
}

/** A line of the last `count` values, with a dashed line at `target`. */
export function line(svg, values, { count = 60, target = 0 } = {}) {
  blank(svg);
  const most = Math.max(target, ...values, 1e-6) * 1.1;
  const step = WIDTH / (count - 1);
  const start = WIDTH - (values.length - 1) * step;
  const y = (value) => HEIGHT - (value / most) * (HEIGHT - 2);
  const points = values.map((value, i) => `${(start + i * step).toFixed(1)},${y(value).toFixed(1)}`);
  limit(svg, target, most);
  if (points.length < 2) return;
  draw(svg, "polygon", { points: `${start},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`, class: "area" });
  draw(svg, "polyline", { points: points.join(" "), class: "line" });
}

/** Bars of the last `count` rows, each one stacked from its values, with a dashed line at `target`. */
export function bars(svg, rows, { count = 30, target = 0 } = {}) {
  blank(svg);
  const sums = rows.map((row) => row.reduce((sum, value) => sum + value, 0));
  const most = Math.max(target, ...sums, 1e-6) * 1.1;
  const step = WIDTH / count;
  rows.forEach((row, i) => {
    let top = HEIGHT;
    row.forEach((value, kind) => {
      const height = (value / most) * (HEIGHT - 2);
      top -= height;
      const x = WIDTH - (rows.length - i) * step;
      draw(svg, "rect", { x, y: top, width: step * 0.8, height, class: `kind${kind}` });
    });
  });
  limit(svg, target, most);
}
