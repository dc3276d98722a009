// Elements from data: every text becomes a text node, so nothing of a report is ever read as markup.

function make(namespace, tag, attributes, children) {
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== ""));
  return element;
}

const el = (tag, attributes = {}, ...children) =>
  make("http://www.w3.org/1999/xhtml", tag, attributes, children);

const svg = (tag, attributes = {}, ...children) =>
  make("http://www.w3.org/2000/svg", tag, attributes, children);

const byId = (id) => document.getElementById(id);

const mark = (style) =>
  el("span", { class: "mark", "data-status": style.status, "aria-hidden": "true" }, style.symbol);

const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// A table with a header row, which scrolls where it is too wide; rows are lists of texts or elements.
function table(caption, head, rows) {
  return el("div", { class: "scroll" }, el("table", { class: "plain" },
    el("caption", { class: "unseen" }, caption),
    el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((item) => el("td", {}, item)))))));
}
