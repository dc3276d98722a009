// A tensor as its ranks hold it: cut to scale, coloured by rank; copies lie behind one another.

const WIDTH = 260;
const LIFT = 5; // between copies
const COPIES = 4; // drawn of one piece

const rankClass = (number) => `part rank-${number % 8}`;

// Ranks that hold a piece, and how much of it along the dim that is cut.
function label(drawing, piece) {
  const [first, ...others] = piece.ranks;
  const names = !others.length ? `rank ${first}`
    : others.length > 2 ? `${piece.ranks.length} ranks` : `ranks ${piece.ranks.join(", ")}`;
  return drawing.partial && piece.ranks.length > 1 ? `${names}: sum` : names;
}

function drawPiece(drawing, piece, box) {
  const copies = drawing.plain ? [0] : piece.ranks.slice(0, COPIES).reverse();
  const rects = copies.flatMap((number, i) => {
    const lift = (copies.length - 1 - i) * LIFT;
    const at = { x: box.x + lift, y: box.y - lift, width: box.width, height: box.height };
    const rect = svg("rect", { ...at, class: drawing.plain ? "edge" : rankClass(number) });
    return drawing.partial ? [rect, svg("rect", { ...at, class: "addend" })] : [rect];
  });
  const text = label(drawing, piece);
  const fits = text.length * 6.7 < box.width;
  return svg("g", {}, rects,
    svg("text", { x: box.x + box.width / 2, y: box.y + box.height / 2 + 4, "text-anchor": "middle" },
      fits ? text : String(piece.ranks[0])));
}

function drawTensor(drawing) {
  const pieces = list(drawing.pieces).map((piece) =>
    ({ ranks: piece.ranks, across: piece.across ?? [0, 1], down: piece.down ?? [0, 1] }));
  const [wide, high] = drawing.size ?? [1, 1];
  const most = Math.max(1, ...pieces.map((piece) => Math.min(piece.ranks.length, COPIES)));
  const room = (most - 1) * LIFT;
  const width = WIDTH - room - 2;
  const height = drawing.down ? 96 : 40;
  const boxes = pieces.map((piece) => ({
    piece,
    x: 1 + (piece.across[0] / wide) * width,
    y: 1 + room + (piece.down[0] / high) * height,
    width: ((piece.across[1] - piece.across[0]) / wide) * width,
    height: ((piece.down[1] - piece.down[0]) / high) * height,
  }));
  return el("figure", {},
    el("figcaption", {}, el("b", {}, drawing.tensor), drawing.dims ? ` (${drawing.dims})` : "",
      el("div", { class: "dim" }, drawing.placements.join(", "))),
    pieces.length
      ? svg("svg", { viewBox: `0 0 ${WIDTH} ${height + room + 2}`, role: "img", "aria-label": drawing.text },
        boxes.filter((box) => box.width > 0 && box.height > 0).map((box) => drawPiece(drawing, box.piece, box)))
      : null,
    el("div", { class: "dim small" }, drawnWords(drawing, pieces)));
}

// Beneath a drawing: which dims are cut and how long the pieces are, or what is not cut.
function drawnWords(drawing, pieces) {
  if (!pieces.length) return drawing.text;
  if (drawing.plain) return "an ordinary tensor, the same on every rank";
  if (!drawing.across) {
    const one = pieces[0].ranks.length === 1;
    if (drawing.partial) return "each rank holds an addend; their sum is the tensor";
    return one ? "all of it on one rank" : "whole on every rank";
  }
  const cuts = [["across", drawing.across], ["down", drawing.down]].filter(([, name]) => name);
  const words = cuts.map(([side, name]) => `${name}: ${lengths(pieces, side, drawing.to_scale !== false)}`);
  return [...words, drawing.partial ? "of addends" : ""].filter(Boolean).join("; ");
}

function lengths(pieces, side, toScale) {
  const ranges = [...new Set(pieces.map((piece) => piece[side].join("-")))].map((text) => text.split("-"));
  return toScale
    ? ranges.map(([start, stop]) => stop - start).join(" + ")
    : `${ranges.length} pieces, their sizes are not in this report`;
}
