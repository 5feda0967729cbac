// @ts-check
// The keyboard: on the page it scrolls and zooms; in the diagram the arrows go from event to event.

const TYPING = "input, select, textarea, dialog, [contenteditable]";
const PRESSING = "button, a, summary, input, select";

/** @param {any} stage the diagram's element @param {any} view @param {any} hooks step, stepLane, zoom, unpin, live, stale */
export function listenToKeys(stage, view, hooks) {
  document.addEventListener("keydown", (event) => {
    const target = /** @type {Element} */ (event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest(TYPING)) return;
    if (event.key === " " && target.closest(PRESSING)) return;
    const inside = target === stage;
    const action = actionOf(event, inside);
    if (!action) return;
    event.preventDefault();
    action();
  });

  function actionOf(event, inside) {
    const quarter = view.span / 4;
    switch (event.key) {
      case " ":
        return () => (view.following ? view.follow(false) : view.goLive());
      case "+":
      case "=":
        return () => hooks.zoom(0.6);
      case "-":
        return () => hooks.zoom(1 / 0.6);
      case "ArrowLeft":
        return inside && !event.shiftKey ? () => hooks.step(-1, false) : () => view.scroll(-quarter);
      case "ArrowRight":
        return inside && !event.shiftKey ? () => hooks.step(1, false) : () => view.scroll(quarter);
      case "ArrowUp":
        return inside ? () => (event.shiftKey ? hooks.stepLane(-1) : hooks.step(-1, true)) : null;
      case "ArrowDown":
        return inside ? () => (event.shiftKey ? hooks.stepLane(1) : hooks.step(1, true)) : null;
      case "End":
        return inside ? () => hooks.live() : null;
      case "Escape":
        return () => hooks.unpin();
      case "s":
        return () => hooks.stale();
      default:
        return null;
    }
  }
}
