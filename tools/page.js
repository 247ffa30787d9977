"use strict";
// Draws the panels' figures in the colours of the scheme, and shows the views that the controls name.

const panels = JSON.parse(document.getElementById("panels").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const shown = Object.fromEntries(Object.keys(panels).map((name) => [name, 0]));

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A copy in which the names of custom properties are their colours. */
function coloured(value) {
  if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(coloured);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item)]));
}

function axis(given) {
  const lines = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
  return { automargin: true, ...lines, ...given };
}

function themed(layout) {
  const all = coloured(layout);
  for (const key of ["xaxis", "yaxis"]) all[key] = axis(all[key]);
  for (const key of ["xaxis", "yaxis", "zaxis"]) if (all.scene) all.scene[key] = axis(all.scene[key]);
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 8, t: 8, b: 8 },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    ...all,
  };
}

function draw(name) {
  const element = document.getElementById(name);
  const view = panels[name].views[shown[name]];
  const caption = element.querySelector(".caption");
  if (caption) caption.textContent = view.text;
  element.querySelectorAll(".figure").forEach((place, number) => {
    const figure = view.figures[number];
    place.hidden = !figure;
    if (!figure) return;
    place.setAttribute("aria-label", figure.label);
    Plotly.react(place, coloured(figure.traces), themed(figure.layout), { responsive: true, displayModeBar: false });
  });
}

function choose(name, viewName) {
  const number = panels[name].views.findIndex((view) => view.name === viewName);
  if (number < 0) return;
  shown[name] = number;
  const control = document.querySelector(`#${name} select`);
  if (control) control.selectedIndex = number;
  draw(name);
}

for (const [name, panel] of Object.entries(panels)) {
  draw(name);
  const element = document.getElementById(name);
  const control = element.querySelector("select");
  if (control) control.addEventListener("change", () => choose(name, panel.views[control.selectedIndex].name));
  if (panel.opens === null) continue;
  for (const place of element.querySelectorAll(".figure")) {
    place.on("plotly_click", (event) => {
      choose(panel.opens, event.points[0].customdata);
      const behavior = calm.matches ? "auto" : "smooth";
      document.getElementById(panel.opens).scrollIntoView({ block: "nearest", behavior });
    });
  }
}

dark.addEventListener("change", () => Object.keys(panels).forEach(draw));
