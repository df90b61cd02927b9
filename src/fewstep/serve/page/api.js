// Requests to this server, with the key of its user where the server asks for one.

const KEPT = "fewstep.key"; // in sessionStorage: gone when the tab is closed
let askForKey = async (_wrong) => null;

/** How to ask the user for a key: a function that gets whether the last one was wrong, and gives the key, or null. */
export function keysFrom(ask) {
  askForKey = ask;
}

/** An answer that is an error. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The server's answer. `Refused` for errors, TypeError where there is no server. */
export async function request(path, { method = "GET", body } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEPT);
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
    if (answer.ok) return answer;
    if (answer.status !== 401) throw new Refused(answer.status, await messageOf(answer));
    const given = await askForKey(key !== null);
    if (given === null) throw new Refused(401, "This server needs a key.");
    sessionStorage.setItem(KEPT, given);
  }
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered ${answer.status} ${answer.statusText}.`;
  }
}

/** The models that are served. */
export async function models() {
  return (await (await request("/v1/models")).json()).data;
}

/** A WebSocket to `/v1/stream`. Its ticket is good for one connection, and stands in no address. */
export async function socket() {
  const { ticket } = await (await request("/v1/stream/tickets", { method: "POST" })).json();
  const address = new URL("/v1/stream", location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  return new WebSocket(address, ["fewstep.v1", `ticket.${ticket}`]);
}

/** Let the user keep a file. */
export function keep(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
