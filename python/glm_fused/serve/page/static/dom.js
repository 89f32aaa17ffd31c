// Elements made and found; texts only ever become text nodes.

/** The element of that id. */
export function $(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found;
}

/**
 * A new element. `attributes` are set by name; a value of undefined, null or false leaves one out.
 * `children` are nodes or strings, which become text.
 */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** A new SVG element, as `make` makes HTML's. */
export function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** Show an element, or hide it. */
export function show(node, shown) {
  node.hidden = !shown;
}

/** Set a text, where it differs: what has not changed is not drawn or read out again. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
