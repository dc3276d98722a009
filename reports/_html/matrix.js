// The heat map: operators down, placements or versions across; one cell can be reached by Tab, the others by arrows.

const BOTH = "both";
let current = ""; // the place of the cell that Tab reaches: operator, direction, column
// What can stand across, the first one at the beginning: the name of a field of cases, and its values.
const pivots = report.pivots ?? [{ name: "placement", values: report.placements }];
let across = pivots[0];

function group(items, key) {
  const groups = new Map();
  for (const item of items) {
    const at = key(item);
    if (!groups.has(at)) groups.set(at, []);
    groups.get(at).push(item);
  }
  return groups;
}

// Operators of which nothing ran would fill the matrix with nothing: they are listed below it.
const ranAtAll = new Set(
  report.cases.filter((item) => item.status !== "unavailable").map((item) => item.operator));
const planned = report.cases.filter((item) => report.placements.includes(item.placement));
const showsAll = () =>
  filter.text !== "" || filter.statuses.size > 0 || !planned.some((item) => ranAtAll.has(item.operator));

// Forward first, and directions whose cells are alike in one row, as in attncheck.view.
function rowsOf(items) {
  const rows = [];
  for (const [operator, own] of group(items, (item) => item.operator)) {
    const directions = [...group(own, (item) => item.direction)].sort(([a], [b]) =>
      (a !== "forward") - (b !== "forward") || (a < b ? -1 : 1));
    for (const [direction, cases] of directions) {
      const cells = group(cases, (item) => item[across.name]);
      const seen = JSON.stringify(across.values.map((column) =>
        cells.has(column) ? cellText(summarise(cells.get(column))) : ""));
      const last = rows.at(-1);
      if (last && last.operator === operator && last.seen === seen) {
        last.direction = BOTH;
        for (const [column, more] of cells) last.more.set(column, more);
      } else {
        rows.push({ operator, direction, cells, seen, more: new Map() });
      }
    }
  }
  return rows;
}

function cellButton(row, column) {
  const items = row.cells.get(column);
  const cell = summarise(items);
  const place = JSON.stringify([row.operator, row.direction, column]);
  const button = el("button",
    { type: "button", class: "cell", "data-status": cell.style.status, "data-place": place, tabindex: "-1" },
    el("span", { "aria-hidden": "true" }, cellText(cell)),
    el("span", { class: "unseen" }, cellWords(cell)));
  button.addEventListener("click", () => {
    setCurrent(button);
    openPanel(`${row.operator}, ${column}, ${row.direction}`, [...items, ...list(row.more.get(column))]);
  });
  return button;
}

function drawMatrix() {
  const grid = byId("grid");
  if (!grid) return;
  const shown = planned.filter((item) => matches(item) && (showsAll() || ranAtAll.has(item.operator)));
  const there = new Set(shown.map((item) => item[across.name]));
  const columns = across.values.filter((name) => there.has(name));
  const rows = rowsOf(shown);
  grid.tHead.rows[0].replaceChildren(
    ...["operator", "direction", ...columns].map((text) => el("th", { scope: "col" }, text)));
  grid.tBodies[0].replaceChildren(...rows.map((row, i) => el("tr", {},
    el("th", { scope: "row" },
      el("span", { class: i && rows[i - 1].operator === row.operator ? "again" : undefined }, row.operator)),
    el("td", { class: "direction" }, row.direction),
    columns.map((name) => el("td", {}, row.cells.has(name) ? cellButton(row, name) : null)))));
  const left = report.cases.length - new Set([...shown, ...report.cases.filter((c) => !matches(c))]).size;
  byId("left-out").textContent = left
    ? `${counted(left, "case")} of operators of which nothing ran ${left === 1 ? "is" : "are"} not in the matrix.`
    : "";
  byId("left-out").hidden = !left;
  const buttons = [...grid.querySelectorAll("button")];
  setCurrent(buttons.find((button) => button.dataset.place === current) ?? buttons[0]);
}

function setCurrent(button) {
  for (const other of byId("grid").querySelectorAll('button[tabindex="0"]')) other.tabIndex = -1;
  if (!button) return;
  button.tabIndex = 0;
  current = button.dataset.place;
}

// The next cell in a direction that is not empty.
function neighbour(button, down, across) {
  const rows = [...byId("grid").tBodies[0].rows];
  let y = rows.indexOf(button.closest("tr")) + down;
  let x = button.closest("td").cellIndex + across;
  while (rows[y]?.cells[x]) {
    const found = rows[y].cells[x].querySelector("button");
    if (found) return found;
    y += down;
    x += across;
  }
  return null;
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function moveInMatrix(event) {
  const button = event.target.closest("button.cell");
  if (!button || event.ctrlKey || event.altKey || event.metaKey) return;
  const row = [...button.closest("tr").querySelectorAll("button")];
  const ends = { Home: row[0], End: row.at(-1) };
  const target = STEPS[event.key] ? neighbour(button, ...STEPS[event.key]) : ends[event.key];
  if (!target) return;
  event.preventDefault();
  setCurrent(target);
  target.focus();
}
