// @ts-check
// Short notices of the results of commands; an error stays longer.

import { byId, make } from "./dom.js";

const MOST = 4;

export function toast(text, error = false) {
  const box = byId("toasts");
  const notice = make("div", { class: error ? "toast error" : "toast" }, make("span", { text: (error ? "✗ " : "✓ ") + text }));
  const close = () => notice.remove();
  notice.append(make("button", { type: "button", "aria-label": "Dismiss", text: "×", onclick: close }));
  box.append(notice);
  while (box.childElementCount > MOST) box.firstElementChild.remove();
  setTimeout(close, error ? 12000 : 5000);
}

/** Asks for the token in a dialog; null if it was dismissed. @returns {Promise<string|null>} */
export function askForToken() {
  const dialog = byId("token-dialog");
  const input = byId("token");
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" && input.value.trim() ? input.value.trim() : null), { once: true });
  });
}

byId("token-form")?.addEventListener("submit", (event) => {
  event.preventDefault();
  byId("token-dialog").close("ok");
});
byId("token-cancel")?.addEventListener("click", () => byId("token-dialog").close(""));
