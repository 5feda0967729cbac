// @ts-check
// Elements made and changed from data. Text only, never HTML: what comes from the server is not markup.

/**
 * A new element; keys of `props` that start with "on" are listeners, `text` is its text, the rest are attributes
 * (false and null: left out).
 * @param {string} tag @param {Record<string, any>} [props] @param {...(Node|string|null|undefined)} children
 * @returns {any}
 */
export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child !== null && child !== undefined) element.append(child);
  return element;
}

/** The element of the page with this id. @param {string} id @returns {any} */
export const byId = (id) => document.getElementById(id);

/** Sets the text only where it differs, so that an unchanged page is not laid out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets an attribute only where it differs. */
export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
}

/** The 2D context of a canvas sized to its box (or as given) and the screen's pixels, in CSS pixels; null while it has no size. */
export function sizedContext(canvas, width = canvas.clientWidth, height = canvas.clientHeight) {
  const ratio = window.devicePixelRatio || 1;
  if (!width || !height) return null;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height };
}

const live = byId("spoken");
let spoken = "";

/** Has a screen reader say this, politely. */
export function say(text) {
  if (!live) return;
  // The same text twice would not be announced twice; a trailing space makes it differ.
  spoken = text === spoken ? text + "\u00a0" : text;
  live.textContent = spoken;
}
