// @ts-check
// The stream of events, and commands the other way.

/** Listens to the server. `hooks`: hello(data, first), batch(text), lost(), back(). */
export function listen(hooks, first = true) {
  const source = new EventSource("/inspector/events");
  let greeted = !first;
  source.addEventListener("hello", (event) => {
    hooks.back();
    hooks.hello(JSON.parse(event.data), !greeted);
    greeted = true;
  });
  source.addEventListener("batch", (event) => hooks.batch(event.data));
  source.addEventListener("error", () => {
    hooks.lost();
    // A connection that was refused outright is closed for good; one that broke is taken up again by the browser.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => listen(hooks, !greeted), 2000);
  });
  return source;
}

const KEY = "rocket-inspector-token";

/** Sends commands; asks for the token, once, where one is needed. */
export class Commands {
  /** @param {() => Promise<string|null>} askForToken */
  constructor(askForToken) {
    this.askForToken = askForToken;
    this.tokenRequired = false;
  }

  /** What the server said came of it. Raises an Error with one sentence. */
  async send(command) {
    let token = this.tokenRequired ? sessionStorage.getItem(KEY) : "1";
    if (!token) {
      token = await this.askForToken();
      if (!token) throw new Error("Nothing was sent: the token is needed for that.");
      sessionStorage.setItem(KEY, token);
    }
    let answer;
    try {
      answer = await fetch("/inspector/control", { method: "POST", headers: { "Content-Type": "application/json", "Rocket-Inspector": token }, body: JSON.stringify(command) });
    } catch {
      throw new Error("The server did not answer.");
    }
    const body = await answer.json().catch(() => ({}));
    if (answer.ok) return body.said ?? "Done.";
    // A wrong token is forgotten, so that the next command asks again.
    if (answer.status === 403 && this.tokenRequired) sessionStorage.removeItem(KEY);
    throw new Error(body.error ?? `The server answered ${answer.status}.`);
  }
}
