// The cases of the report, and which of them the reader asks for.

const report = JSON.parse(byId("data").textContent);
const rank = new Map(report.statuses.map((style, i) => [style.status, i]));
const styleOf = (status) => report.statuses[rank.get(status)];
// What cases of several versions share stands once, in front.
if (report.shared) report.cases = report.cases.map(({ at, ...own }) => ({ ...report.shared[at], ...own }));
const list = (value) => value ?? []; // what is empty is left out of the data

const filter = { text: "", statuses: new Set(), changes: new Set(), facets: new Map() };
const filtered = () =>
  filter.text !== "" || filter.statuses.size > 0 || filter.changes.size > 0 || filter.facets.size > 0;

const searchable = new Map();

// All that a reader may look a case up by.
function haystack(item) {
  if (!searchable.has(item)) {
    const parts = [
      item.id, item.operator, item.setting, item.function, item.kernel_op, item.exception, item.message,
      item.reason, item.change, styleOf(item.status).word, item.placements,
      ...list(item.missing).map(([op]) => op), ...list(item.findings).map((i) => report.rules[i]),
      ...list(item.facts).flat(),
    ];
    searchable.set(item, parts.filter(Boolean).join("\n").toLowerCase());
  }
  return searchable.get(item);
}

function matches(item) {
  if (filter.statuses.size && !filter.statuses.has(item.status)) return false;
  if (filter.changes.size && !filter.changes.has(item.change)) return false;
  for (const [name, value] of filter.facets) if ((item[name] ?? "") !== value) return false;
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => haystack(item).includes(word));
}

// The verdict on cases that share a cell, as attncheck.view.Cell: the worst status; a check that failed
// hides a pass, never a failure; cases that were unavailable do not count.
function summarise(items) {
  const styles = items.map((item) => styleOf(item.status));
  const failed = styles.filter((style) => style.ran && !style.usable);
  const unknown = styles.find((style) => style.status === "unknown");
  const pool = failed.length ? failed : unknown ? [unknown] : styles;
  const worst = pool.reduce((a, b) => (rank.get(a.status) <= rank.get(b.status) ? a : b));
  return {
    style: worst,
    ok: styles.filter((style) => style.usable).length,
    total: styles.filter((style) => style.status !== "unavailable").length,
  };
}

function cellText({ style, ok, total }) {
  return total ? `${style.symbol} ${ok}/${total}` : style.symbol;
}

function cellWords({ style, ok, total }) {
  return total ? `${style.word}, ${ok} of ${total} right` : style.word;
}
