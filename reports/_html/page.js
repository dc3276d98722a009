// What the page can do beyond its tables: filter, search, copy, change colours, print unfolded.

// --- filters

function redraw() {
  drawMatrix();
  const found = report.cases.filter(matches).length;
  byId("matched").textContent = filtered()
    ? `${found} of ${counted(report.cases.length, "case")} match.` : "";
  byId("list").textContent = found === 1 ? "List the case" : `List ${counted(found, "case")}`;
  byId("list").disabled = found === 0;
  byId("reset").hidden = !filtered();
}

function listMatching() {
  const found = report.cases.filter(matches);
  if (found.length) openPanel(filtered() ? "Matching cases" : "All cases", found);
}

function facetSelect(facet) {
  const select = el("select", { "data-facet": facet.name },
    el("option", { value: "-1" }, "all"),
    facet.values.map((value, i) => el("option", { value: String(i) }, value || "(none)")));
  select.addEventListener("change", () => {
    const at = Number(select.value);
    if (at < 0) filter.facets.delete(facet.name);
    else filter.facets.set(facet.name, facet.values[at]);
    redraw();
  });
  const preset = facet.values.indexOf((report.preset ?? {})[facet.name]);
  if (preset >= 0) {
    select.value = String(preset);
    filter.facets.set(facet.name, facet.values[preset]);
  }
  return el("label", {}, facet.name, select);
}

// What stands across, where there is a choice.
function acrossSelect() {
  if (pivots.length < 2) return null;
  const select = el("select", { id: "across" },
    pivots.map((pivot, i) => el("option", { value: String(i) }, pivot.name)));
  select.addEventListener("change", () => {
    across = pivots[Number(select.value)];
    redraw();
  });
  return el("label", {}, "columns", select);
}

// The counts of a list become buttons that filter by what they count.
function pressable(items, chosen, value) {
  for (const item of items) {
    const button = el("button", { type: "button", "aria-pressed": "false" });
    button.append(...item.childNodes);
    item.replaceChildren(button);
    button.addEventListener("click", () => {
      const on = !chosen.has(value(item));
      if (on) chosen.add(value(item));
      else chosen.delete(value(item));
      button.setAttribute("aria-pressed", String(on));
      redraw();
    });
  }
}

function reset() {
  filter.text = "";
  filter.statuses.clear();
  filter.changes.clear();
  filter.facets.clear();
  byId("search").value = "";
  for (const select of document.querySelectorAll("[data-facet]")) select.value = "-1";
  for (const button of document.querySelectorAll(".counts button")) button.setAttribute("aria-pressed", "false");
  redraw();
}

function addFilters() {
  const search = el("input", {
    type: "search", id: "search", autocomplete: "off", spellcheck: "false",
    placeholder: "operator, setting, kernel op, message", "aria-keyshortcuts": "/",
  });
  const all = el("button", { type: "button", class: "quiet", id: "list" });
  const clear = el("button", { type: "button", class: "quiet", id: "reset" }, "Clear filters");
  search.addEventListener("input", () => {
    filter.text = search.value.trim();
    redraw();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault(); // or it would press what the list gives focus to
      listMatching();
    }
    const cell = byId("grid").querySelector('button[tabindex="0"]');
    if (event.key === "ArrowDown" && cell) {
      event.preventDefault();
      cell.focus();
    }
  });
  all.addEventListener("click", listMatching);
  clear.addEventListener("click", () => {
    reset();
    search.focus();
  });
  byId("filters").append(
    el("label", {}, el("span", {}, "Search ", el("kbd", { "aria-hidden": "true" }, "/")), search),
    ...[acrossSelect()].filter(Boolean), ...list(report.facets).map(facetSelect), all, clear,
    el("p", { class: "dim small keys", id: "keys" },
      "/ searches, arrow keys move between cells, Enter opens what has the focus, Escape closes it."));
  byId("grid").setAttribute("role", "grid");
  byId("grid").setAttribute("aria-describedby", "keys");
  byId("filters").hidden = false;
}

// --- copying

function addCopyButtons(root) {
  for (const block of root.querySelectorAll(".copyable:not(:has(button))")) {
    block.append(el("button", { type: "button", class: "quiet", "data-copy": true }, "Copy"));
  }
}

async function copy(button) {
  const text = button.parentNode.querySelector("pre").textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = copyBySelection(text, button.parentNode);
  }
  button.textContent = done ? "Copied" : "Select it to copy";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

// Where there is no clipboard, as on a page of plain HTTP.
function copyBySelection(text, near) {
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  near.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

// --- colours and print

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : prefersDark.matches;
};

function nameTheme() {
  byId("theme").textContent = isDark() ? "Light colours" : "Dark colours";
}

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
}

let folded = [];

addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const fold of folded) fold.open = true;
});
addEventListener("afterprint", () => {
  for (const fold of folded) fold.open = false;
});

// --- keys

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button);
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing && !panel.open && byId("search")) {
    event.preventDefault();
    byId("search").focus();
  }
});

// --- start

if (byId("grid")) {
  addFilters();
  pressable(document.querySelectorAll("#counts li"), filter.statuses, (item) => item.dataset.status);
  pressable(document.querySelectorAll("#change-counts li"), filter.changes, (item) => item.dataset.change);
  byId("grid").addEventListener("keydown", moveInMatrix);
  redraw();
} else if (byId("summary") && report.cases.length) {
  // Cases that no matrix shows: a model's attention calls.
  const all = el("button", { type: "button", class: "quiet", id: "list" },
    report.cases.length === 1 ? "List the case" : `List ${counted(report.cases.length, "case")}`);
  all.addEventListener("click", () => openPanel("All cases", report.cases));
  byId("summary").append(all);
}
const casesOf = new Map(); // by the number of a finding
for (const item of report.cases) {
  for (const number of list(item.findings)) {
    if (!casesOf.has(number)) casesOf.set(number, []);
    casesOf.get(number).push(item);
  }
}
for (const [number, items] of casesOf) {
  const button = el("button", { type: "button", class: "quiet cases-of" }, `Show ${counted(items.length, "case")}`);
  button.addEventListener("click", () => openPanel(report.rules[number], items));
  byId(`finding-${number}`).append(button);
}
addCopyButtons(document);
byId("theme").hidden = false;
byId("theme").addEventListener("click", switchTheme);
prefersDark.addEventListener("change", nameTheme);
nameTheme();
document.documentElement.dataset.ready = "true"; // for whoever waits for it
