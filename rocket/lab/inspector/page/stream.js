// @ts-check
// The stream of events, and the commands to the server.

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
    // The browser restores a broken connection, but not one that was refused.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => listen(hooks, !greeted), 2000);
  });
  return source;
}

const KEY = "rocket-inspector-token";

/** Sends commands; asks for the token once, if one is needed. */
export class Commands {
  /** @param {() => Promise<string|null>} askForToken */
  constructor(askForToken) {
    this.askForToken = askForToken;
    this.tokenRequired = false;
  }

  /** Sends a command and returns its result. Throws an Error with one sentence. */
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
