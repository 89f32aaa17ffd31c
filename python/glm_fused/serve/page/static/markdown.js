// The Markdown that models write, as elements. Every text becomes a text node: nothing of it is HTML.
import { make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.+?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$|^\s*\|\s*:?-+:?\s*\|\s*$/;
const DEEPEST = 16; // lists and quotes within each other

/**
 * Show `text` in `node`. The elements of blocks that have not changed since the last call stay, so
 * that a long answer that grows is cheap and a selection in it survives.
 */
export function renderMarkdown(node, text) {
  const blocks = splitBlocks(text.split("\n"));
  const kept = node.sources ?? [];
  let same = 0;
  while (same < blocks.length && kept[same] === blocks[same].source) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  for (const block of blocks.slice(same)) node.append(blockElement(block, 0));
  node.sources = blocks.map((block) => block.source);
}

/** Show `text` as it is, each letter as wide as the next. */
export function renderPlain(node, text) {
  node.sources = undefined;
  node.replaceChildren(make("p", { class: "plain" }, text));
}

/** The blocks of lines: {kind, source, …}, in their order. */
function splitBlocks(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const block = takeFence(lines, i) ?? takeLine(lines, i) ?? takeGroup(lines, i);
    blocks.push({ ...block, source: `${block.kind} ${lines.slice(i, block.end).join("\n")}` });
    i = block.end;
  }
  return blocks;
}

function takeFence(lines, start) {
  const open = FENCE.exec(lines[start]);
  if (!open) return null;
  const close = new RegExp(`^ {0,3}${open[1][0]}{${open[1].length},}\\s*$`);
  let end = start + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const code = lines.slice(start + 1, end).join("\n");
  return { kind: "code", language: open[2], code, end: Math.min(end + 1, lines.length) };
}

function takeLine(lines, start) {
  const heading = HEADING.exec(lines[start]);
  if (heading) return { kind: `h${heading[1].length}`, text: heading[2], end: start + 1 };
  return RULE.test(lines[start]) ? { kind: "rule", end: start + 1 } : null;
}

function takeGroup(lines, start) {
  if (QUOTE.test(lines[start])) {
    const end = endOf(lines, start, (line) => QUOTE.test(line));
    return { kind: "quote", lines: lines.slice(start, end).map((l) => QUOTE.exec(l)[1]), end };
  }
  if (ITEM.test(lines[start])) return takeList(lines, start);
  if (lines[start].includes("|") && TABLE_RULE.test(lines[start + 1] ?? "")) {
    const end = endOf(lines, start + 2, (line) => line.includes("|"));
    return { kind: "table", lines: lines.slice(start, end), end };
  }
  const end = endOf(lines, start + 1, (line) => line.trim() && !opensBlock(line));
  return { kind: "text", text: lines.slice(start, end).join("\n"), end };
}

function opensBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function endOf(lines, start, belongs) {
  let end = start;
  while (end < lines.length && belongs(lines[end])) end++;
  return end;
}

/** A list: its items' lines without their indentation, each to be split into blocks in turn. */
function takeList(lines, start) {
  const first = ITEM.exec(lines[start]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = start;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const depth = line.length - line.trimStart().length;
    if (item && depth <= indent + 1) {
      if (depth < indent || /\d/.test(item[2]) !== ordered || RULE.test(line)) break;
      items.push([item[3]]);
    } else if (line.trim() ? depth > indent : indented(lines[end + 1], indent)) {
      items.at(-1).push(line.slice(Math.min(depth, indent + 2)));
    } else break;
    end++;
  }
  const number = ordered ? Number.parseInt(first[2], 10) : undefined;
  return { kind: ordered ? "ol" : "ul", items, start: number, end };
}

function indented(line, indent) {
  return line !== undefined && line.trim() !== "" && /^\s*/.exec(line)[0].length > indent;
}

function blockElement(block, depth) {
  if (depth > DEEPEST) return make("p", {}, block.source);
  switch (block.kind) {
    case "code":
      return codeElement(block.code, block.language);
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...nested(block.lines, depth));
    case "table":
      return tableElement(block.lines);
    case "ol":
    case "ul": {
      const items = block.items.map((lines) => make("li", {}, ...nested(lines, depth)));
      return make(block.kind, { start: block.start === 1 ? undefined : block.start }, ...items);
    }
    case "text":
      return make("p", {}, ...inline(block.text));
    default: // the page has headings of its own above these
      return make(`h${Math.min(Number(block.kind[1]) + 2, 6)}`, {}, ...inline(block.text));
  }
}

function nested(lines, depth) {
  return splitBlocks(lines).map((block) => blockElement(block, depth + 1));
}

/** A block of code, with a button that copies it. */
export function codeElement(code, language = "") {
  const copy = make("button", { type: "button", class: "quiet copy" }, "Copy");
  copy.addEventListener("click", () => copyText(copy, code));
  const head = make("div", { class: "code-head" }, make("span", {}, language || "code"), copy);
  const body = make("pre", { tabindex: "0", "aria-label": "Code" }, make("code", {}, code));
  return make("div", { class: "code-block" }, head, body);
}

/** Copy `text`, and say on the button for a moment how that went. */
export async function copyText(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = label), 1500);
}

function tableElement(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
  const row = (tag, line) => make("tr", {}, ...cells(line).map((c) => make(tag, {}, ...inline(c))));
  const head = make("thead", {}, row("th", lines[0]));
  const body = make("tbody", {}, ...lines.slice(2).map((line) => row("td", line)));
  return make("div", { class: "table", tabindex: "0" }, make("table", {}, head, body));
}

// Code first, since nothing within it counts; then links, bold and italics (with stars alone:
// underscores are part of names).
const INLINE =
  /(`+)([^`]|[^`][^]*?[^`])\1(?!`)|\[([^\]\n]+)\]\(([^\s()]+)\)|\*\*(?=\S)([^]+?\S)\*\*|\*(?=[^\s*])([^*\n]*[^\s*])\*/g;

/** The nodes of a text with code, links, bold and italics in it. */
function inline(text, depth = 0) {
  if (depth > 4) return [text];
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) nodes.push(text.slice(at, match.index));
    nodes.push(inlineElement(match, depth));
    at = match.index + match[0].length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function inlineElement([whole, , code, label, target, bold, italic], depth) {
  if (code !== undefined) return make("code", {}, code);
  if (bold !== undefined) return make("strong", {}, ...inline(bold, depth + 1));
  if (italic !== undefined) return make("em", {}, ...inline(italic, depth + 1));
  if (!/^https?:\/\//i.test(target)) return whole; // no javascript:, no data:
  return make("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, label);
}
