"""Report `html`: one file that opens from disk: what ran, how near its budget every case came, what failed.

The page holds the verdicts as compact JSON, and a script of its own draws what the reader asks for: the
table of cases and paths, filtered, and of a verdict its checks, the batch with what failed of it marked, and
the lines that run and draw it again. Nothing is loaded from anywhere, and without the script the summary and
the first failures still read.

Every text of a verdict is data: it is escaped on its way into the page, the script writes it as text alone,
and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from cases import Case, CaseError, Kind, Row, parse
from cases.contract import operators
from cases.layers import Layer
from harness.run import Summary
from harness.verdict import CheckResult, Status, Verdict, plain
from reports.console import counts_line, place_text
from reports.writer import Writer

MAX_ROWS = 24
"""Slots of a step that are drawn; those that failed come first."""

MAX_BLOCKS = 12
"""Blocks of a row that are drawn: half of them its first, half its last."""

MAX_FIGURE_BYTES = 1_200_000
MAX_FIGURE_BLOCKS = 200_000
"""Size of a page's drawings, and blocks of a case that is drawn; `show` draws the others."""

MAX_PLAIN_FAILURES = 20
"""Failing verdicts that read without the script."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --panel: #f4f4f1; --text: #1d1f21; --quiet: #62676d; --line: #deded9; --focus: #2563a8;
  --pass: #cfe0ee; --bad: #b3301a; --bad-soft: #fbe3dc; --good: #2c7a4b; --held: #cbd4dd; --new: #7db0e3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181a; --panel: #1e2124; --text: #e4e5e3; --quiet: #9aa0a6; --line: #33373b; --focus: #7fb2e5;
    --pass: #21405a; --bad: #ff8a70; --bad-soft: #46231c; --good: #6cc08b; --held: #3f4c59; --new: #2f6fae;
  }
}
* { box-sizing: border-box; }
body {
  background: var(--page); color: var(--text); font: 14px/1.45 system-ui, "Segoe UI", Roboto, sans-serif;
  margin: 0 auto; max-width: 88rem; padding: 1.6rem 1.6rem 6rem;
}
h1 { font-size: 1.5rem; font-weight: 600; letter-spacing: -.01em; line-height: 1.2; margin: 0; }
h2 { font-size: 1rem; font-weight: 600; margin: 2rem 0 .5rem; }
h3 { font-size: .8rem; font-weight: 600; margin: 0 0 .35rem; }
p { margin: .3rem 0; }
.quiet, figcaption { color: var(--quiet); } .bad { color: var(--bad); } .good { color: var(--good); }
code, .mono { font: 12.5px/1.45 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; }
.bar { display: block; height: 6px; margin: .9rem 0 .35rem; width: 100%; }
.passed { fill: var(--good); } .failed, .error, .xpassed { fill: var(--bad); }
.skipped { fill: var(--line); } .xfailed { fill: var(--held); }
.key svg { height: .6em; margin-right: .35em; width: .6em; }
.key { margin-right: 1.2em; white-space: nowrap; }
.pair { display: grid; font-size: 13px; gap: 0 2.5rem; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); }
@media (max-width: 70rem) { .pair { grid-template-columns: minmax(0, 1fr); } }
.wide { overflow-x: auto; } .tall { max-height: 22rem; overflow: auto; scrollbar-width: thin; }
.tall thead th { background: var(--page); position: sticky; top: 0; } .tall td { white-space: nowrap; }
.tall th, .tall td { padding-left: .3rem; padding-right: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .5rem; text-align: right; }
th, td { vertical-align: top; }
th { font-weight: 400; } thead th { color: var(--quiet); font-size: .8rem; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; text-align: left; } td.left, th.left { text-align: left; }
button, input, select { background: none; border: 1px solid var(--line); border-radius: 4px; color: inherit;
  font: inherit; padding: .2rem .5rem; }
button { cursor: pointer; } select { background: var(--page); }
button:hover { border-color: var(--quiet); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
button.name { border: 0; padding: 0; text-align: left; } button.name:hover { text-decoration: underline; }
.filters {
  align-items: center; background: var(--page); border-bottom: 1px solid var(--line); display: flex;
  flex-wrap: wrap; gap: .5rem; padding: .6rem 0; position: sticky; top: 0; z-index: 1;
}
.filters input { flex: 1 1 14rem; } .filters select { max-width: 15rem; }
.legend { align-items: center; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .5rem 0 .8rem; }
.legend i { border-radius: 2px; display: inline-block; height: .8em; margin-right: .35em;
  outline: 1px solid var(--line); width: 1.6em; }
.map { width: auto; min-width: 100%; }
.map > tbody > tr > td { padding: 1px; }
.map > tbody > tr > th { padding: .28rem 1rem .28rem 0; width: 100%; }
.map > thead th { max-width: 9rem; padding: .2rem .35rem; text-align: center; }
.map > thead th:first-child { padding-left: 0; text-align: left; }
.text { -webkit-box-orient: vertical; -webkit-line-clamp: 2; display: -webkit-box; overflow: hidden;
  overflow-wrap: anywhere; }
.cell { border-color: transparent; border-radius: 3px; min-width: 5.2rem; padding: .2rem .3rem; width: 100%; }
.cell[aria-expanded=true] { border-color: var(--text); }
.p0 { background: transparent; } .p1 { background: color-mix(in srgb, var(--pass) 35%, transparent); }
.p2 { background: color-mix(in srgb, var(--pass) 65%, transparent); } .p3 { background: var(--pass); }
.p0, .p1, .p2 { color: var(--quiet); }
.f1 { background: var(--bad-soft); color: var(--bad); }
.f2 { background: color-mix(in srgb, var(--bad) 38%, var(--bad-soft)); }
.f3 { background: var(--bad); color: var(--page); font-weight: 600; }
.s { color: var(--quiet); }
.x { background: repeating-linear-gradient(135deg, var(--bad-soft) 0 4px, transparent 4px 8px); }
#map .detail > td { background: var(--panel); padding: 1rem 1.2rem 1.2rem; text-align: left; }
.detail table { font-size: .9rem; } .detail table td:first-child { padding-left: 0; }
.detail table td:not(.num), .detail table th:not(.num) { text-align: left; }
.detail td { max-width: 24rem; overflow-wrap: break-word; } .detail td.num { white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1rem 0; }
figure { margin: 0; max-width: 100%; }
figure:first-child { flex-basis: 100%; } figure:first-child figcaption { max-width: 60rem; }
figcaption { font-size: .8rem; max-width: 23rem; padding-top: .3rem; }
.line { align-items: start; display: flex; gap: .5rem; margin: .3rem 0; }
.line code { background: var(--page); border: 1px solid var(--line); border-radius: 4px; flex: 1;
  overflow-wrap: anywhere; padding: .25rem .5rem; user-select: all; white-space: pre-wrap; }
.again { margin-top: 1rem; } .line button { min-width: 5.5rem; }
.facts { font-size: .85rem; overflow-wrap: anywhere; }
figure > svg { display: block; height: auto; max-width: 100%; overflow: visible; }
svg text { fill: var(--text); font: 11px ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
svg .faint { fill: var(--quiet); } svg .badtext { fill: var(--bad); font-weight: 600; }
svg .frame { fill: none; stroke: var(--line); }
svg .held { fill: var(--held); } svg .new { fill: var(--new); }
svg .mark { fill: var(--bad); } svg .soft { fill: var(--bad); opacity: .4; }
svg .ring { fill: none; stroke: var(--bad); stroke-width: 2; }
svg .shared { stroke: var(--text); stroke-dasharray: 3 2; }
@media print { .filters, .again { margin-top: 1rem; } .line button { display: none; } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const FIELDS = ["case", "operator", "path", "lane", "status", "kind", "reason", "environment", "ratio",
  "checks", "figure", "inputs", "outputs", "seconds"];
const CHECKED = ["name", "status", "tensor", "reason", "error", "budget", "ratio", "source", "where", "place",
  "got", "expected", "token", "head"];
const TEXTS = new Set([...FIELDS.slice(0, 8), "name", "tensor", "source", "place"]);
const BAD = new Set(["failed", "error", "xpassed"]);
const PAGE = 60, LONG = 300;
function named(row, names) {
  const record = {};
  names.forEach((name, i) => {
    const value = row[i] ?? null;
    record[name] = value !== null && TEXTS.has(name) ? data.texts[value] : value;
  });
  if (record.ratio === "inf") record.ratio = Infinity;
  return record;
}
const verdicts = data.verdicts.map(row => {
  const verdict = named(row, FIELDS);
  verdict.bad = BAD.has(verdict.status);
  verdict.column = columnOf(verdict);
  return verdict;
});
function checkOf(index) {
  const check = named(data.checks[index], CHECKED);
  const where = Object.entries(check.where || {}).map(([axis, value]) => [axis, data.texts[value]]);
  check.where = Object.fromEntries(where);
  return check;
}

function columnOf(verdict) {
  const end = verdict.path.indexOf("/" + verdict.operator);
  const family = end < 0 ? verdict.path : verdict.path.slice(0, end);
  const variant = end < 0 ? "" : verdict.path.slice(end + verdict.operator.length + 1);
  return family + variant + "\n" + verdict.lane;
}

// ---- making elements: what a verdict says becomes text, never markup ----
function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}
function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}
function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== undefined && value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
function times(ratio) {
  if (ratio === Infinity) return "\u221e\u00a0\u00d7";
  return (ratio >= 100 ? Math.round(ratio).toLocaleString("en") : ratio.toPrecision(2)) + "\u00a0\u00d7";
}
function number(value) {
  if (typeof value === "string" || value === 0) return String(value);
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toExponential(2)
    : String(Number(value.toPrecision(6)));
}
function spans(text) {
  return (text || "").split(",").filter(Boolean).map(part => {
    const match = /^(-?\d+)(?:-(-?\d+))?$/.exec(part) || [0, 0, 0];
    return [Number(match[1]), Number(match[2] ?? match[1])];
  });
}
function within(ranges, value) { return ranges.some(([a, b]) => a <= value && value <= b); }

// ---- the table of cases and paths ----
const groups = new Map();
for (const verdict of verdicts) {
  if (!groups.has(verdict.case)) groups.set(verdict.case, []);
  groups.get(verdict.case).push(verdict);
}
function weight(verdict) {
  const rank = verdict.bad ? 2e9 : verdict.status === "xfailed" ? 1e9 : 0;
  return rank + Math.min(verdict.ratio ?? (verdict.bad ? 1e8 : 0), 1e8);
}
const order = [...groups.entries()].map(([text, list]) => [text, list, Math.max(...list.map(weight))]);
order.sort((a, b) => b[2] - a[2]);
const controls = {};
for (const name of ["text", "status", "operator", "path", "lane"]) {
  controls[name] = document.getElementById("by-" + name);
}
let shown = PAGE;

function matching() {
  const words = controls.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = controls.status.value;
  const names = ["operator", "path", "lane"].filter(name => controls[name].value);
  const fits = verdict => (!status || (status === "bad" ? verdict.bad : verdict.status === status))
    && names.every(name => verdict[name] === controls[name].value)
    && words.every(word => haystack(verdict).includes(word));
  return order.map(([text, list]) => [text, list.filter(fits)]).filter(([, list]) => list.length);
}
function haystack(verdict) {
  verdict.words ??= [verdict.case, verdict.path, verdict.lane, verdict.status, verdict.kind, verdict.reason]
    .join(" ").toLowerCase();
  return verdict.words;
}
function look(verdict) {
  const {ratio, status} = verdict;
  if (status === "skipped") return ["s", "skipped"];
  if (status === "xfailed") return ["x", "known"];
  if (status === "xpassed") return ["f2", "now passes"];
  if (verdict.bad) {
    const told = verdict.kind === "wrong" && ratio > 1;
    const depth = !told ? "f3" : ratio > 100 ? "f3" : ratio > 4 ? "f2" : "f1";
    return [depth, told ? times(ratio) : (verdict.kind || status).replaceAll("_", " ")];
  }
  if (ratio === null) return ["p0", "pass"];
  return [ratio > .75 ? "p3" : ratio > .5 ? "p2" : ratio > .25 ? "p1" : "p0", ratio.toFixed(2)];
}
function render() {
  const found = matching(), body = document.getElementById("map");
  const count = found.reduce((sum, [, list]) => sum + list.length, 0);
  const columns = [...new Set(found.flatMap(([, list]) => list.map(verdict => verdict.column)))].sort();
  document.getElementById("count").textContent =
    `${count.toLocaleString("en")} of ${verdicts.length.toLocaleString("en")} verdicts`;
  const head = make("tr", {}, make("th", {scope: "col"}, "case"), ...columns.map(column => {
    const [family, lane] = column.split("\n");
    return make("th", {scope: "col"}, family, make("br"), lane);
  }));
  body.replaceChildren(make("thead", {}, head));
  const rows = make("tbody");
  for (const [text, list] of found.slice(0, shown)) rows.append(rowOf(text, list, columns));
  body.append(rows);
  const more = document.getElementById("more"), left = found.length - shown;
  more.hidden = left <= 0;
  more.textContent = `Show ${Math.min(left, PAGE * 4)} of ${left.toLocaleString("en")} more cases`;
  document.getElementById("nothing").hidden = found.length > 0;
}
function rowOf(text, list, columns) {
  // A line may end behind each row and option.
  const pieces = text.slice(0, LONG).split(/(?<=[,/])/).flatMap(piece => [piece, make("wbr")]);
  const name = make("span", {class: "mono text", title: text}, ...pieces, text.length > LONG ? "\u2026" : "");
  const row = make("tr", {}, make("th", {scope: "row"}, name));
  for (const column of columns) {
    const cell = make("td");
    for (const verdict of list.filter(item => item.column === column)) {
      const [style, word] = look(verdict);
      cell.append(make("button", {
        class: "cell " + style, "aria-expanded": "false", title: verdict.reason || verdict.status,
        "aria-label": `${verdict.status}, ${word}: ${verdict.path} in lane ${verdict.lane}`,
        click: event => toggle(event.currentTarget, row, verdict, columns.length + 1),
      }, word));
    }
    row.append(cell);
  }
  return row;
}
function toggle(button, row, verdict, width) {
  const open = button.getAttribute("aria-expanded") === "true", next = row.nextElementSibling;
  for (const other of row.querySelectorAll("button")) other.setAttribute("aria-expanded", "false");
  if (next && next.className === "detail") next.remove();
  if (open) return;
  button.setAttribute("aria-expanded", "true");
  const label = `${verdict.path} in lane ${verdict.lane}`;
  const panel = make("td", {colspan: width, role: "region", "aria-label": label}, ...detail(verdict));
  row.after(make("tr", {class: "detail"}, panel));
}

// ---- one verdict ----
function detail(verdict) {
  const state = verdict.status + (verdict.kind ? ", " + verdict.kind.replaceAll("_", " ") : "");
  const head = make("p", {}, make("strong", {class: verdict.bad ? "bad" : ""}, state), ": ",
    `${verdict.path} in lane ${verdict.lane}`);
  const parts = [head];
  if (verdict.reason) parts.push(make("p", {}, verdict.reason));
  const checks = verdict.checks.map(checkOf);
  const figure = data.figures[verdict.figure];
  if (figure) parts.push(make("div", {class: "figures"}, ...figures(figure, checks)));
  else if (verdict.bad) parts.push(make("p", {class: "quiet"}, "Not drawn here; the second line below may."));
  const plain = checks.filter(check => check.status === "passed" && check.ratio === null);
  const told = checks.filter(check => !plain.includes(check));
  told.sort((a, b) => (b.status === "failed") - (a.status === "failed"));
  if (told.length) parts.push(make("div", {class: "wide"}, checkTable(told)));
  if (plain.length) parts.push(make("p", {class: "facts quiet"}, "Passed: " + tensorsOf(plain)));
  parts.push(make("h3", {class: "again"}, "Again"), command(commandOf("repro", verdict)));
  if (verdict.bad) parts.push(command(commandOf("show", verdict)));
  const [compile, run, oracle] = verdict.seconds;
  const facts = [`compile ${compile} s, run ${run} s, oracle ${oracle} s`];
  if (verdict.inputs) facts.push(`inputs ${verdict.inputs}`);
  if (verdict.outputs) facts.push(`outputs ${verdict.outputs}`);
  if (verdict.environment) facts.push(verdict.environment);
  parts.push(make("p", {class: "facts quiet"}, facts.join("; ")));
  return parts;
}
function checkTable(checks) {
  const titles = ["check", "tensor", "result", "error", "allowed", "share", "worst element", "where",
    "budget"];
  const numbers = ["error", "allowed", "share"];
  const head = titles.map(title => make("th", {scope: "col", class: numbers.includes(title) ? "num" : null},
    title));
  const body = checks.map(check => make("tr", {},
    make("th", {scope: "row"}, check.name), make("td", {class: "mono"}, check.tensor || ""),
    make("td", {class: check.status === "failed" ? "bad" : ""},
      check.reason ? `${check.status}: ${check.reason}` : check.status),
    make("td", {class: "num"}, check.error === null ? "" : number(check.error)),
    make("td", {class: "num"}, check.budget === null ? "" : number(check.budget)),
    make("td", {class: "num"}, check.ratio === null ? ""
      : times(check.ratio)),
    make("td", {}, check.place === null ? ""
      : `${check.place}: got ${number(check.got)}, expected ${number(check.expected)}`),
    make("td", {}, Object.entries(check.where).map(([k, v]) => `${k} ${v}`).join("; ")),
    make("td", {class: "quiet"}, check.source || "")));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
}
function tensorsOf(checks) {
  const named = new Map();
  for (const {name, tensor} of checks) named.set(name, [...named.get(name) || [], ...tensor ? [tensor] : []]);
  const told = ([name, list]) => list.length ? `${name} of ${list.join(", ")}` : name;
  return [...named].map(told).join("; ") + ".";
}
function commandOf(name, verdict) {
  return data.commands[name].replace(/CASE|PATH|LANE/g, word => verdict[word.toLowerCase()]);
}
function command(text) {
  const code = make("code", {tabindex: "0"}, text);
  const button = make("button", {type: "button", click: () => copy(code, button)}, "Copy");
  return make("div", {class: "line"}, code, button);
}
async function copy(code, button) {
  getSelection().selectAllChildren(code);
  let done = false;
  try { await navigator.clipboard.writeText(code.textContent); done = true; }
  catch { done = document.execCommand("copy"); }
  button.textContent = done ? "Copied" : "Selected";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ---- figures ----
function figures(figure, checks) {
  const failing = checks.filter(check => check.status === "failed");
  const marks = name => failing.flatMap(check => spans(check.where[name]));
  const made = [batch(figure, marks("rows"), marks("blocks"))];
  const named = failing.filter(check => check.where.tokens);
  for (const check of named.slice(0, 2)) made.push(tokens(figure, check));
  const wide = failing.find(check => check.where.dims && figure.widths[check.tensor]);
  if (wide) made.push(strip(wide, figure.widths[wide.tensor]));
  return made;
}
function figureOf(title, picture, caption) {
  return make("figure", {}, make("h3", {}, title), picture, make("figcaption", {}, caption));
}
function batch(figure, badRows, badBlocks) {
  const left = 200, wide = 44, high = 20, pieces = [];
  let y = 0, right = left;
  for (const row of figure.rows) {
    if (typeof row === "number") {
      const told = `\u2026 ${row.toLocaleString("en")} rows more`;
      pieces.push(draw("text", {x: 36, y: y + 13, class: "faint"}, told));
      y += high;
      continue;
    }
    const [slot, text, held, added, total, blocks] = row, bad = within(badRows, slot);
    if (bad) pieces.push(draw("rect", {x: 0, y: y + 2, width: 3, height: high - 4, class: "mark"}));
    const name = slot < 0 ? "" : String(slot);
    pieces.push(draw("text", {x: 28, y: y + 14, "text-anchor": "end", class: "faint"}, name));
    const short = text.length > 22 ? text.slice(0, 21) + "\u2026" : text;
    pieces.push(draw("text", {x: 36, y: y + 14, class: bad ? "badtext" : ""}, short,
      draw("title", {}, text)));
    const gap = total > blocks.length ? blocks.length / 2 : Infinity;
    let x = left;
    blocks.forEach((block, drawn) => {
      if (drawn === gap) {
        const skipped = `\u2026 ${total - blocks.length}`;
        pieces.push(draw("text", {x: x + 3, y: y + 14, class: "faint"}, skipped));
        x += 12 + 7 * skipped.length;
      }
      const j = drawn < gap ? drawn : drawn + total - blocks.length;
      const shared = block < 0, id = shared ? ~block : block;
      const size = figure.block, from = j * size, share = count => wide * count / size;
      const old = Math.max(0, Math.min(held - from, size));
      const fresh = Math.max(0, Math.min(held + added - from, size)) - old;
      const wrong = bad && within(badBlocks, id);
      const title = `block ${j} of the row is ${id}: ${old} cached, ${fresh} new${shared ? ", shared" : ""}`;
      pieces.push(draw("g", {}, draw("title", {}, title),
        draw("rect", {x, y: y + 3, width: share(old), height: high - 6, class: "held"}),
        draw("rect", {x: x + share(old), y: y + 3, width: share(fresh), height: high - 6, class: "new"}),
        draw("rect", {x: x + .5, y: y + 3.5, width: wide - 1, height: high - 7,
          class: "frame" + (shared ? " shared" : "")}),
        wrong ? draw("rect", {x, y: y + 3, width: wide, height: high - 6, class: "ring"}) : null,
        draw("text", {x: x + wide / 2, y: y + 14, "text-anchor": "middle"}, id)));
      x += wide + 3;
    });
    right = Math.max(right, x);
    y += high;
  }
  const step = figure.step === null ? "" : ` of step ${figure.step}`;
  const told = badRows.length ? "failing slots are marked in red" : "no check names a slot";
  const layer = figure.layer === null ? "" : ` of layer ${figure.layer}`;
  const caption = make("span", {}, `Slot, row and its physical blocks${layer}, ${figure.block} tokens each: `,
    swatch("held"), "cached ", swatch("new"), "new; dashed is shared; ",
    `${told}${badBlocks.length ? ", failing blocks ringed" : ""}.`);
  const names = badRows.map(([a, b]) => a === b ? a : `${a} to ${b}`).join(", ");
  return figureOf("Batch" + step, picture(right + 10, y, `batch; failing slots: ${names || "none"}`, pieces),
    caption);
}
function picture(width, height, label, pieces) {
  const size = {width, height: Math.max(height, 1)};
  return draw("svg", {...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": label},
    ...pieces);
}
function swatch(name) {
  return draw("svg", {width: 18, height: 9, "aria-hidden": "true"},
    draw("rect", {width: 14, height: 9, class: name}));
}
function tokens(figure, check) {
  const across = spans(check.where.heads), down = spans(check.where.tokens);
  const heads = across.length ? Math.max(figure.heads, ...across.map(range => range[1] + 1)) : 1;
  const count = Math.max(figure.tokens, ...down.map(range => range[1] + 1));
  const left = 62, top = 16;
  const cw = Math.min(16, 260 / heads), ch = Math.min(16, 240 / count);
  const width = Math.max(cw * heads, 16), height = ch * count, pieces = [];
  pieces.push(draw("rect", {x: left, y: top, width, height, class: "frame"}));
  let last = -20;
  for (const [slot, start] of figure.starts) {
    const y = top + start * ch;
    pieces.push(draw("line", {x1: left - 4, x2: left + width, y1: y, y2: y, stroke: "var(--line)"}));
    if (y - last >= 11) {
      const name = slot < 0 ? "pad" : `slot ${slot}`;
      pieces.push(draw("text", {x: left - 8, y: y + Math.min(11, Math.max(8, ch)), "text-anchor": "end",
        class: "faint"}, name));
      last = y;
    }
  }
  const columns = across.length ? across : [[0, 0]];
  for (const [a, b] of down.slice(0, 400)) for (const [c, d] of columns.slice(0, 100)) {
    pieces.push(draw("rect", {x: left + (across.length ? c * cw : 0), y: top + a * ch,
      width: across.length ? Math.max((d - c + 1) * cw, 1) : width, height: Math.max((b - a + 1) * ch, 1),
      class: "soft"}));
  }
  if (check.token !== null) {
    // Large enough to be seen, about its own middle.
    const one = across.length ? cw : width, w = Math.max(one, 5), h = Math.max(ch, 5);
    const x = left + (across.length ? (check.head || 0) * cw : 0) - (w - one) / 2;
    const y = top + check.token * ch - (h - ch) / 2;
    pieces.push(draw("rect", {x, y, width: w, height: h, class: "mark"}, draw("title", {}, check.place)));
  }
  const ratio = check.ratio === null ? "" : `, ${times(check.ratio)} its budget`;
  if (across.length) pieces.push(draw("text", {x: left, y: 10, class: "faint"}, `heads 0\u2013${heads - 1}`));
  const shaded = across.length ? "the tokens and the heads that fail, not each pair of them"
    : "the tokens that fail";
  const worst = check.token === null ? "" : `; solid: the worst, ${check.place}${ratio}`;
  const caption = `Shaded: ${shaded}${worst}.`;
  const name = `${check.name} of ${check.tensor}`;
  const label = `failing tokens ${check.where.tokens}, heads ${check.where.heads || "all"}`;
  return figureOf(name + (across.length ? ": tokens by heads" : ": tokens"),
    picture(left + width + 8, top + height + 4, label, pieces), caption);
}
function strip(check, columns) {
  const dims = spans(check.where.dims), width = 320;
  const total = Math.max(columns, ...dims.map(range => range[1] + 1));
  const pieces = dims.slice(0, 600).map(([a, b]) => draw("rect", {x: a / total * width, y: 0,
    width: Math.max((b - a + 1) / total * width, 1), height: 16, class: "soft"}));
  pieces.push(draw("rect", {x: .5, y: .5, width: width - 1, height: 15, class: "frame"}));
  const told = dims.length > 8 ? `${dims.length} runs of columns` : `columns ${check.where.dims}`;
  return figureOf(`${check.name} of ${check.tensor}: columns`,
    picture(width, 17, `failing columns ${check.where.dims}`, pieces),
    `Shaded: what fails, ${told} of ${total.toLocaleString("en")}.`);
}

// ---- filters ----
for (const name of ["operator", "path", "lane"]) {
  const values = [...new Set(verdicts.map(verdict => verdict[name]))].sort();
  controls[name].append(...values.map(value => make("option", {value}, value)));
}
for (const control of Object.values(controls)) {
  control.addEventListener("input", () => { shown = PAGE; render(); });
}
document.getElementById("more").addEventListener("click", () => { shown += PAGE * 4; render(); });
document.getElementById("clear").addEventListener("click", () => {
  for (const control of Object.values(controls)) control.value = "";
  shown = PAGE;
  render();
});
for (const cell of document.querySelectorAll("[data-filter]")) {
  const [name, value, lane] = JSON.parse(cell.dataset.filter);
  const button = make("button", {class: "name", type: "button", title: "Show these verdicts", click: () => {
    for (const control of Object.values(controls)) control.value = "";
    controls[name].value = value;
    if (lane) controls.lane.value = lane;
    shown = PAGE;
    render();
    document.getElementById("verdicts").scrollIntoView();
  }}, ...cell.childNodes);
  cell.replaceChildren(button);
}
document.getElementById("app").hidden = false;
render();
"""


class HtmlReport:
    """Collects verdicts; the page is written at the end, whole."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("w", encoding="utf-8", errors="backslashreplace")
        self._run: dict[str, Any] = {}
        self._verdicts: list[Verdict] = []

    def begin(self, run: dict[str, Any]) -> None:
        self._run = run

    def verdict(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)

    def end(self, summary: Summary) -> None:
        with self._stream:
            self._stream.write(page(self._run, self._verdicts, summary))


def page(run: dict[str, Any], verdicts: Sequence[Verdict], summary: Summary) -> str:
    """The whole page."""
    # The end of a script element would end it inside of a string too.
    data = json.dumps(_data(verdicts), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'"
    bad = [verdict for verdict in verdicts if verdict.is_bad]
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(_headline(verdicts))}</title><style>{STYLE}</style></head>\n<body>",
            _header(run, verdicts, summary),
            '<div class="pair">',
            _table("By operator", ("operator",), verdicts),
            _table("By path and lane", ("path", "lane"), verdicts),
            "</div>",
            f"<noscript>{_plain_failures(bad)}</noscript>",
            _APP,
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{SCRIPT}</script></body></html>\n",
        )
    )


_APP = """<main id="app" hidden>
<h2 id="verdicts">Cases and paths: error over budget</h2>
<div class="filters" role="search" aria-label="Filter verdicts">
<input type="search" id="by-text" placeholder="Words of a case, path or reason" aria-label="Words">
<select id="by-status" aria-label="Status"><option value="">every status</option>
<option value="bad">failing</option><option>passed</option><option>failed</option><option>error</option>
<option>xpassed</option><option>xfailed</option><option>skipped</option></select>
<select id="by-operator" aria-label="Operator"><option value="">every operator</option></select>
<select id="by-path" aria-label="Path"><option value="">every path</option></select>
<select id="by-lane" aria-label="Lane"><option value="">every lane</option></select>
<button type="button" id="clear">Clear</button>
<span id="count" class="quiet" role="status"></span></div>
<p class="legend quiet"><span><i class="p0"></i>far below the budget</span>
<span><i class="p2"></i>above half of it</span><span><i class="p3"></i>near it</span>
<span><i class="f1"></i>over</span><span><i class="f2"></i>by more than 4</span>
<span><i class="f3"></i>by more than 100, or no number</span><span><i class="x"></i>known failure</span>
<span>A cell opens its verdict.</span></p>
<div class="wide"><table id="map" class="map"></table></div>
<p id="nothing" hidden>No verdict fits these filters.</p>
<p><button type="button" id="more" hidden></button></p>
</main>"""


# ---- what reads without the script ---------------------------------------------------------------


def _headline(verdicts: Sequence[Verdict]) -> str:
    bad = sum(verdict.is_bad for verdict in verdicts)
    judged = sum(verdict.status is not Status.SKIPPED for verdict in verdicts)
    if not judged:
        return "Nothing was judged"
    return f"{bad:,} of {judged:,} verdicts failed" if bad else f"None of {judged:,} verdicts failed"


def _header(run: dict[str, Any], verdicts: Sequence[Verdict], summary: Summary) -> str:
    counts = {status: count for status, count in summary.counts.items() if count}
    about = [f"mla-harness {run.get('version', '')}".strip()]
    if run.get("lane"):
        about.append(f"lane {run['lane']}")
    if run.get("suites"):
        about.append(f"suites {', '.join(run['suites'])}")
    about += [counts_line(summary), f"exit code {summary.exit_code}"]
    word = "bad" if any(verdict.is_bad for verdict in verdicts) else "good" if verdicts else "quiet"
    bars, at = [], 0.0
    for status, count in counts.items():
        width = 1000 * count / max(summary.total, 1)
        bars.append(f'<rect class="{status.value}" x="{at:.2f}" width="{width:.2f}" height="6"/>')
        at += width
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 8 8" aria-hidden="true"><rect class="{status.value}" width="8" '
        f'height="8"/></svg>{count:,} {status.value}</span>'
        for status, count in counts.items()
    )
    return (
        f'<header><h1 class="{word}">{escape(_headline(verdicts))}</h1>'
        f'<p class="quiet">{escape("; ".join(about))}</p>'
        f'<svg class="bar" viewBox="0 0 1000 6" preserveAspectRatio="none" aria-hidden="true">{"".join(bars)}'
        f"</svg><p>{keys}</p></header>"
    )


def _table(title: str, names: tuple[str, ...], verdicts: Sequence[Verdict]) -> str:
    """Verdicts counted by status, of each value of some fields; those with a failure first."""
    statuses = [status for status in Status if any(verdict.status is status for verdict in verdicts)]
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(tuple(getattr(verdict, name) for name in names), []).append(verdict)
    rows = []
    order = sorted(groups, key=lambda key: (not any(verdict.is_bad for verdict in groups[key]), key))
    for key in order:
        group = groups[key]
        target = escape(json.dumps([names[0], *key]))
        first = f'<th scope="row" data-filter="{target}">{escape(key[0])}</th>'
        rest = "".join(f'<td class="left">{escape(part)}</td>' for part in key[1:])
        counts = "".join(_count(status, group) for status in statuses)
        ratio = max((ratio for verdict in group if (ratio := _ratio(verdict)) is not None), default=None)
        seconds = sum(verdict.seconds.run for verdict in group)
        worst = "<td></td>" if ratio is None else f"<td{_bad(ratio > 1)}>{_times(ratio)}</td>"
        rows.append(f"<tr>{first}{rest}{counts}{worst}<td>{seconds:,.1f}</td></tr>")
    left = "".join(f'<th scope="col" class="left">{name}</th>' for name in names)
    right = "".join(f'<th scope="col">{status.value}</th>' for status in statuses)
    return (
        f'<section><h2>{title}</h2><div class="tall" tabindex="0" role="group" aria-label="{title}">'
        f"<table><thead><tr>{left}{right}"
        f'<th scope="col">of budget</th><th scope="col">run, s</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _count(status: Status, group: Sequence[Verdict]) -> str:
    count = sum(verdict.status is status for verdict in group)
    is_bad = status in (Status.FAILED, Status.ERROR, Status.XPASSED)
    return f"<td{_bad(is_bad)}>{count:,}</td>" if count else "<td></td>"


def _bad(is_bad: bool) -> str:
    return ' class="bad"' if is_bad else ""


def _times(ratio: float) -> str:
    if math.isinf(ratio):
        return "&infin; &times;"
    return f"{ratio:,.0f} &times;" if ratio >= 10 else f"{ratio:.2f} &times;"


def _plain_failures(bad: Sequence[Verdict]) -> str:
    items = "".join(
        f"<li>{escape(f'{verdict.path} in lane {verdict.lane}: {verdict.reason}')}<br>"
        f"<code>{escape(verdict.repro)}</code></li>"
        for verdict in bad[:MAX_PLAIN_FAILURES]
    )
    more = len(bad) - MAX_PLAIN_FAILURES
    tail = f"<p>... and {more:,} more: the table of all verdicts needs JavaScript.</p>" if more > 0 else ""
    return f"<h2>Failures</h2><ul>{items}</ul>{tail}" if items else ""


def _digest(text: str) -> str:
    """What a content security policy calls a style or a script that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- what the script reads -----------------------------------------------------------------------


class _Table:
    """Distinct values in the order they came, and the place of each."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.size = 0
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        key = value if isinstance(value, str) else json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
            self.size += len(key)
        return self._places[key]


def _data(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Verdicts and checks as rows of places in tables; FIELDS and CHECKED of the script name the columns."""
    texts, checks, figures = _Table(), _Table(), _Table()
    rows = []
    for verdict in verdicts:
        figure = _figure(verdict) if verdict.is_bad and figures.size < MAX_FIGURE_BYTES else None
        environment = ", ".join(f"{name} {value}" for name, value in verdict.environment.items())
        rows.append(
            [
                texts.place(verdict.case),
                texts.place(verdict.operator),
                texts.place(verdict.path),
                texts.place(verdict.lane),
                texts.place(verdict.status.value),
                texts.place(verdict.kind.value if verdict.kind else ""),
                texts.place(verdict.reason),
                texts.place(environment),
                _short(_ratio(verdict)),
                [checks.place(_check(item, verdict.operator, texts)) for item in verdict.checks],
                figures.place(figure) if figure else -1,
                verdict.inputs_digest,
                verdict.outputs_digest,
                [round(getattr(verdict.seconds, item.name), 4) for item in fields(verdict.seconds)],
            ]
        )
    tables = {"texts": texts.values, "checks": checks.values, "figures": figures.values}
    any_verdict = Verdict("CASE", "", "PATH", "LANE", Status.PASSED)
    commands = {"repro": any_verdict.repro, "show": "python3 -m harness show 'CASE'"}
    return {**tables, "verdicts": rows, "commands": commands}


def _check(check: CheckResult, operator: str, texts: _Table) -> list[Any]:
    """A check as a row; nothing of what it does not say at the end."""
    where = [(item.name, getattr(check.where, item.name)) for item in fields(check.where)]
    source = check.budget_source if check.status is Status.FAILED else ""
    row: list[Any] = [
        texts.place(check.name),
        texts.place(check.status.value),
        texts.place(check.tensor),
        texts.place(check.reason),
        _short(check.error),
        _short(check.budget),
        _short(_check_ratio(check)),
        texts.place(source) if source else None,
        {name: texts.place(value) for name, value in where if value} or None,
    ]
    if check.worst is not None:
        told = (_short(check.worst.got), _short(check.worst.expected))
        row += [texts.place(place_text(check, operator)), *told, *_token_and_head(check, operator)]
    while row[-1] is None:
        row.pop()
    return row


def _token_and_head(check: CheckResult, operator: str) -> tuple[int | None, int | None]:
    """The worst element's token of the step and its head, where the tensor has these axes."""
    axes = _axes(check.tensor, operator)
    index = check.worst.index if check.worst else ()
    place = dict(zip(axes, index, strict=True)) if len(axes) == len(index) else {}
    return place.get("tokens"), place.get("num_attention_heads")


def _axes(tensor: str, operator: str) -> tuple[str, ...]:
    """The axes of an output; none of what is no output."""
    name = tensor.partition("[")[0]
    outputs = operators()[operator].outputs if operator in operators() else ()
    return next((spec.axes for spec in outputs if spec.name == name), ())


def _check_ratio(check: CheckResult) -> float | None:
    """The error as a share of its budget; infinite where it is no number."""
    if check.error is None or not check.budget:
        return None
    ratio = check.error / check.budget
    return math.inf if math.isnan(ratio) else ratio


def _ratio(verdict: Verdict) -> float | None:
    """The largest share of a budget among a verdict's checks."""
    ratios = (_check_ratio(check) for check in verdict.checks)
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _short(value: float | None) -> float | str | None:
    """The value to six digits; NaN and infinities as strings."""
    return value if value is None else plain(float(f"{value:.6g}"))


# ---- the batch of a failing verdict --------------------------------------------------------------


def _figure(verdict: Verdict) -> dict[str, Any] | None:
    """What the script draws of a verdict's batch, or None where it cannot be drawn."""
    # NumPy lays blocks out: nothing else of a report needs it.
    from harness.paging import lay_out
    from harness.picture import shared_blocks

    try:
        case = parse(verdict.case)
    except CaseError:
        return None
    step, index = _place(verdict, case)
    rows, layer = case.steps[step], case.layers[index]
    if sum(-(-row.length // layer.block_size) for rows in case.steps for row in rows) > MAX_FIGURE_BLOCKS:
        return None
    pages = lay_out(case, layer)[step]
    shared = shared_blocks(pages)
    # A shared block's number is kept as its complement.
    blocks = [[~block if block in shared else block for block in own.tolist()] for own in pages.blocks]
    return {
        "step": step if len(case.steps) > 1 else None,
        "layer": index if len(case.layers) > 1 else None,
        "block": layer.block_size,
        "heads": layer.num_attention_heads,
        "tokens": sum(row.new for row in rows),
        "starts": list(_starts(rows)),
        "rows": list(_drawn_rows(rows, blocks, _failing_slots(verdict))),
        "widths": {
            check.tensor: width
            for check in verdict.checks
            if check.where.dims and (width := _width(check.tensor, verdict.operator, layer))
        },
    }


def _place(verdict: Verdict, case: Case) -> tuple[int, int]:
    """The step and the layer of the first failing check that names one; else the first."""
    failed = [check for check in verdict.checks if check.status is Status.FAILED]
    steps = (int(check.where.steps) for check in failed if check.where.steps.isdecimal())
    layers = (int(match[1]) for check in failed if (match := re.search(r"\[(\d+)\]$", check.tensor)))
    step, layer = next(steps, 0), next(layers, 0)
    return min(step, len(case.steps) - 1), min(layer, len(case.layers) - 1)


def _failing_slots(verdict: Verdict) -> set[int]:
    """The slots that failing checks name."""
    texts = [check.where.rows for check in verdict.checks if check.status is Status.FAILED]
    spans = [part.partition("-") for text in texts for part in text.split(",") if part]
    return {slot for a, _, b in spans for slot in range(int(a), int(b or a) + 1)}


def _starts(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """(slot, its first token) of every slot with a token; padding is slot -1. At most `MAX_ROWS`, spread."""
    token, starts = 0, []
    for slot, row in enumerate(rows):
        if row.is_slot and not row.seq_lens_this_time:
            continue
        starts.append((slot if row.is_slot else -1, token))
        token += row.seq_lens_this_time
    yield from starts[:: len(starts) // MAX_ROWS + 1]


def _drawn_rows(
    rows: Sequence[Row], blocks: Sequence[Sequence[int]], failing: set[int]
) -> Iterator[list[Any] | int]:
    """[slot, row, cached, new, number of blocks, the first and the last blocks] of what is drawn, in order.

    A number alone stands for rows left out.
    """
    # Idle slots side by side are one line.
    first = [
        slot
        for slot, row in enumerate(rows)
        if not (row.kind is Kind.IDLE and slot and rows[slot - 1].kind is Kind.IDLE)
        or failing & {slot - 1, slot}
    ]
    ends = dict(pairwise([*first, len(rows)]))
    wanted = sorted(first, key=lambda slot: (slot not in failing, slot))[:MAX_ROWS]
    after = 0
    for slot in sorted(wanted):
        if slot > after:
            yield slot - after
        after = ends[slot]
        row = rows[slot]
        own = blocks[slot] if row.is_slot else ()
        half = MAX_BLOCKS // 2
        drawn = own if len(own) <= MAX_BLOCKS else [*own[:half], *own[-half:]]
        number = slot if row.is_slot else -1
        yield [number, row.text(after - slot), row.cached, row.seq_lens_this_time, len(own), drawn]
    if after < len(rows):
        yield len(rows) - after


def _width(tensor: str, operator: str, layer: Layer) -> int | None:
    """Columns of an output, where its contract names them by a dimension of the layer."""
    axes = _axes(tensor, operator)
    width = getattr(layer, axes[-1], None) if axes else None
    return width if isinstance(width, int) else None


WRITER = Writer("html", "one page that opens from disk: every verdict, what failed drawn", HtmlReport)
