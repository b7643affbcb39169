"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (name, properties = {}, children = []) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

// Tabs: the address names the open one; arrow keys go to the next.
function chooseTab(bar, tab) {
  for (const other of bar.children) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
  }
}
function withArrows(bar) {
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const all = [...bar.children];
    const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
}
const nav = document.querySelector("nav");
function open(id) {
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `part-${id}`;
  chooseTab(nav, document.getElementById(`tab-${id}`));
  draw(document.getElementById(`part-${id}`));
}
nav.addEventListener("click", (event) => {
  const id = event.target.dataset.tab;
  if (!id) return;
  history.replaceState(null, "", `#${id}`);
  open(id);
});
withArrows(nav);

// Charts: drawn when they are first seen, in the theme's colours.
const dark = matchMedia("(prefers-color-scheme: dark)");
function themed() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 13 },
    xaxis: axis, yaxis: axis, modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
  };
}
function layoutOf(figure) {
  const theme = themed();
  const layout = { ...figure.layout, ...theme };
  for (const name of ["xaxis", "yaxis"]) layout[name] = { ...figure.layout[name], ...theme[name] };
  return layout;
}
function draw(section) {
  for (const chart of section.querySelectorAll(".chart")) {
    const figure = data.figures[chart.dataset.figure];
    const options = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" } };
    Plotly.react(chart, figure.data, layoutOf(figure), options);
  }
}
dark.addEventListener("change", () => draw(document.querySelector("main > section:not([hidden])")));

// Sprites as blobs: a tile names one by a short address.
const blobs = new Map();
function address(sprite) {
  if (!blobs.has(sprite)) {
    const bytes = Uint8Array.from(atob(sprite.split(",")[1]), (c) => c.charCodeAt(0));
    blobs.set(sprite, URL.createObjectURL(new Blob([bytes], { type: "image/webp" })));
  }
  return blobs.get(sprite);
}

// A tile of a sprite, shown at a size in pixels.
function tile(name, sprite, columns, rows, column, row, size, sides) {
  const [height, width] = sides;
  const scale = size / Math.max(height, width);
  const made = element("span", { className: "tile", role: "img", ariaLabel: name });
  const [w, h] = [width * scale, height * scale];
  made.style.cssText = `width:${w}px;height:${h}px;background-image:url(${address(sprite)});` +
    `background-size:${columns * w}px ${rows * h}px;background-position:${-column * w}px ${-row * h}px`;
  return made;
}

// Class maps over examples.
const classes = data.gallery.classes;
const classRows = classes.names.map((name, row) => {
  const count = classes.names.length;
  const map = () => tile(`map of class ${name}`, classes.maps, 1, count, 0, row, 64, data.gallery.sides);
  const examples = [...Array(classes.counts[row]).keys()].map((column) =>
    element("span", { className: "over" },
      [tile(`an image of class ${name}`, classes.images, classes.columns, count, column, row, 64, data.gallery.sides), map()]));
  return element("div", { className: "row" }, [element("b", { textContent: name }), map(), ...examples]);
});
document.getElementById("classes").append(...classRows);
document.getElementById("opacity").addEventListener("input", (event) => {
  for (const map of document.querySelectorAll(".over .tile + .tile")) map.style.opacity = event.target.value / 100;
});

// Filters of one layer.
const layers = document.getElementById("layers");
const grid = document.getElementById("filters");
const detail = document.getElementById("detail");
function showFilter(layer, row) {
  const filter = layer.shown[row];
  [...grid.children].forEach((other, index) => other.setAttribute("aria-pressed", index === row));
  const at = (name, column, size) =>
    tile(name, layer.sprite, layer.columns, layer.shown.length, column, row, size, data.gallery.sides);
  const facts = {
    "filter": filter.filter, "rank": `${filter.rank} of ${layer.filters}`, "score": `${filter.score}, higher is better`,
    "became": filter.frozen ? "frozen" : "live",
  };
  const list = Object.entries(facts).flatMap(([name, value]) =>
    [element("dt", { textContent: name }), element("dd", { textContent: value })]);
  const images = [...Array(layer.columns - 1).keys()].map((column) => at("an image that it answers to", column + 1, 56));
  detail.replaceChildren(at(`what filter ${filter.filter} looks for`, 0, 160), element("dl", {}, list),
    element("p", { textContent: "answers most to" }), element("div", { className: "row" }, images));
}
function showLayer(index) {
  const layer = data.gallery.layers[index];
  chooseTab(layers, layers.children[index]);
  grid.parentElement.setAttribute("aria-label", `filters of ${layer.layer}`);
  const count = layer.shown.length;
  grid.replaceChildren(...layer.shown.map((filter, row) => {
    const button = element("button", {
      className: filter.frozen ? "frozen" : "live",
      title: `filter ${filter.filter}, rank ${filter.rank}, ${filter.frozen ? "frozen" : "live"}`,
    }, [tile("", layer.sprite, layer.columns, count, 0, row, 48, data.gallery.sides)]);
    button.setAttribute("aria-label", button.title);
    for (const event of ["mouseenter", "focus", "click"])
      button.addEventListener(event, () => showFilter(layer, row));
    return button;
  }));
  showFilter(layer, 0);
}
data.gallery.layers.forEach((layer, index) => {
  const button = element("button", { textContent: layer.layer, onclick: () => showLayer(index) });
  button.setAttribute("role", "tab");
  button.setAttribute("aria-controls", "layer");
  layers.append(button);
});
withArrows(layers);
grid.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = step && [...grid.children][[...grid.children].indexOf(document.activeElement) + step];
  if (!next) return;
  next.focus();
  event.preventDefault();
});
if (data.gallery.layers.length) showLayer(0);

// Numbers to take away.
function save(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
function csv(table) {
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  const cell = (value) => (value === null || value === undefined ? "" : `"${text(value).replaceAll('"', '""')}"`);
  return [table.columns, ...table.rows.map((row) => table.columns.map((name) => row[name]))]
    .map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
}
for (const table of data.downloads) {
  const buttons = [
    element("button", { textContent: `${table.name}.csv`, onclick: () => save(`${table.name}.csv`, "text/csv", csv(table)) }),
    element("button", {
      textContent: `${table.name}.json`,
      onclick: () => save(`${table.name}.json`, "application/json", JSON.stringify(table.rows, null, 1)),
    }),
  ];
  document.getElementById("downloads").append(...buttons);
}

const wanted = location.hash.slice(1);
open(document.getElementById(`tab-${wanted}`) ? wanted : "result");
