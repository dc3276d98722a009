// One case: what came of it, where its tensors lie, what it cost, what mends it.

const section = (title, ...content) =>
  content.flat(Infinity).some(Boolean) ? [el("h3", {}, title), content] : [];

const code = (text) => el("code", {}, text);

function verdict(item) {
  const style = styleOf(item.status);
  const said = [
    item.reason ? `Reason: ${item.reason}.` : "",
    item.exception ? `Exception: ${item.exception}.` : "",
    item.before ? `Without the fix: ${item.before}.` : "",
    item.change ? `Compared: ${item.change}. ${item.changed ?? ""}` : "",
  ].filter(Boolean);
  return [
    el("p", {}, mark(style), " ", el("b", {}, style.word), style.meaning === style.word ? "" : `: ${style.meaning}`),
    item.kernel_op ? el("p", {}, "Kernel op: ", code(item.kernel_op)) : null,
    said.length ? el("p", {}, said.join(" ")) : null,
    item.message ? el("p", { class: "message" }, item.message) : null,
  ];
}

function errorsOf(item) {
  const rows = list(item.errors).map((error) => [
    code(error.tensor),
    el("span", { class: error.beyond ? "beyond" : undefined },
      error.max + (error.beyond ? " (beyond the bound)" : "")),
    error.unsharded, error.bound, error.ratio, error.rms, error.note ?? "",
  ]);
  const head = ["tensor", "max error", "unsharded", "bound", "error / bound", "RMS error", "note"];
  return rows.length ? table("Errors against float64", head, rows) : null;
}

function collectivesOf(item) {
  const rows = list(item.collectives).map((c) => [c.name, c.phase, String(c.count), c.size, code(c.op)]);
  const head = ["collective", "phase", "count", "bytes a rank", "kernel op"];
  return rows.length ? [el("p", {}, item.cost), table("Collectives", head, rows)] : [];
}

function kernelOpsOf(item) {
  const rows = list(item.kernel_ops).map((i) => report.kernel_ops[i]).map((op) => [
    code(op.op), op.phase, op.inputs, op.outputs, String(op.calls)]);
  if (!rows.length) return null;
  const left = item.kernel_ops_left_out;
  return el("details", {},
    el("summary", {}, counted(rows.length, "kernel op") + (left ? ` of ${rows.length + left}` : "")),
    table("Kernel ops", ["op", "phase", "inputs", "outputs", "calls"], rows));
}

// A finding as it stands on the page, opened.
function findingCopy(number) {
  const original = byId(`finding-${number}`);
  const copy = original.cloneNode(true);
  copy.removeAttribute("id");
  for (const part of copy.querySelectorAll("noscript, .cases-of")) part.remove();
  for (const fold of copy.querySelectorAll("details")) fold.open = true;
  return copy;
}

function detail(item) {
  const facts = list(item.facts).map(([name, subject, text]) => [code(name), subject, text]);
  const missing = list(item.missing).map(([op, phase, text]) => [code(op), phase, text]);
  const ranks = list(item.ranks).map(([name, op, text]) => [name, code(op), text]);
  const outputs = list(item.outputs).map(([name, text]) => [code(name), text]);
  const about = [
    ["operator", item.operator], ["function", item.function], ["setting", item.setting],
    ["dtype", item.dtype], ["sizes and options", item.sizes], ["mesh", item.mesh],
    ["placement", item.placement], ["direction", item.direction], ["versions", item.version],
    ["stand-ins", item.standins], ["time", item.timings], ["id", item.id],
  ].filter(([, text]) => text);
  return el("div", { class: "detail" },
    verdict(item),
    section("Placements", list(item.drawings).length
      ? el("div", { class: "drawings" }, item.drawings.map((i) => drawTensor(report.drawings[i]))) : null),
    section("Numbers against float64", errorsOf(item)),
    section("Communication", collectivesOf(item)),
    section("Without a sharding strategy, or refused",
      missing.length ? table("Missing kernel ops", ["kernel op", "phase", "what was said"], missing) : null),
    section("Facts", facts.length ? table("Facts", ["fact", "tensor", "detail"], facts) : null),
    section("Ranks", ranks.length ? table("Ranks", ["rank", "last op", "exception"], ranks) : null),
    section("Placements that came out",
      outputs.length ? table("Outputs", ["tensor", "placements"], outputs) : null),
    section("Findings and what to do", list(item.findings).map(findingCopy)),
    section("The case", el("dl", { class: "pairs" },
      about.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)))),
    kernelOpsOf(item)));
}
