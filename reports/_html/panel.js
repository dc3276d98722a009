// The cases behind a cell, in a dialog: Enter unfolds one, arrows go from one to the next, Escape folds it
// and then closes. The browser gives focus back to where it came from.

const CHUNK = 200; // cases added to the list at a time
const panel = byId("panel");

// What tells the cases of a list apart stands in their lines; what they share stands in its title.
const NAMED = ["operator", "placement", "direction", "mesh", "dtype", "version"];

function caseLine(item, names) {
  const style = styleOf(item.status);
  const beyond = list(item.errors).filter((error) => error.beyond);
  const said = beyond.length
    ? beyond.map((error) => `${error.tensor}: error ${error.max}, bound ${error.bound}`).join("; ")
    : item.message || item.reason || item.cost || "";
  const first = said.split("\n")[0];
  const button = el("button", { type: "button", class: "case", "aria-expanded": "false" },
    mark(style), el("span", {}, style.word), item.change ? el("b", {}, item.change) : null,
    el("span", { class: "name" }, item.setting),
    names.map((name) => el("span", {}, item[name] ?? "")),
    el("span", { class: "dim" }, first.length > 120 ? first.slice(0, 117) + "..." : first));
  const line = el("li", {}, button);
  button.addEventListener("click", () => toggle(line, item));
  return line;
}

function toggle(line, item) {
  const button = line.querySelector(".case");
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!open));
  if (open) line.querySelector(".detail").remove();
  else {
    line.append(detail(item));
    addCopyButtons(line);
  }
}

function openPanel(title, items) {
  const names = NAMED.filter((name) => new Set(items.map((item) => item[name])).size > 1);
  const sorted = [...items].sort((a, b) => rank.get(a.status) - rank.get(b.status));
  const lines = el("ul", {});
  const more = el("button", { type: "button", class: "quiet" });
  const close = el("button", { type: "button", class: "quiet" }, "Close");
  const add = () => {
    const shown = lines.children.length;
    lines.append(...sorted.slice(shown, shown + CHUNK).map((item) => caseLine(item, names)));
    const left = sorted.length - lines.children.length;
    more.textContent = `Show ${Math.min(left, CHUNK)} more of ${left}`;
    more.hidden = left === 0;
  };
  more.addEventListener("click", add);
  close.addEventListener("click", () => panel.close());
  add();
  panel.replaceChildren(
    el("div", { class: "panel-head" },
      el("h2", { id: "panel-title" }, title, " ", el("span", { class: "dim" }, counted(items.length, "case"))),
      close),
    el("div", { class: "panel-body" }, lines, more));
  panel.showModal();
  panel.scrollTop = 0;
  const first = lines.querySelector(".case");
  if (sorted.length === 1) toggle(first.closest("li"), sorted[0]);
  first.focus();
}

function moveInPanel(event) {
  const line = event.target.closest(".panel-body > ul > li");
  if (!line) return;
  const button = line.querySelector(".case");
  if (event.key === "Escape" && line.querySelector(".detail")) {
    event.preventDefault(); // folds this case; the next one closes
    button.click();
    button.focus();
  } else if (event.target === button && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    const next = event.key === "ArrowDown" ? line.nextElementSibling : line.previousElementSibling;
    if (!next) return;
    event.preventDefault();
    next.querySelector(".case").focus();
  }
}

panel.addEventListener("keydown", moveInPanel);
panel.addEventListener("click", (event) => {
  if (event.target === panel) panel.close(); // beside the panel
});
