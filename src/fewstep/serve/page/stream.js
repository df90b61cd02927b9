// One stream: its connection, its messages, and its way back after a lost connection.

import { Refused, socket } from "./api.js";

/** Milliseconds before a lost connection is tried again: for the first time, the second, and so on. */
const PAUSES = [500, 1000, 2000, 5000];
/** Milliseconds without a word after which a connection counts as lost; the server says something every second. */
const SILENCE = 8000;
/** Milliseconds between two reports of what was played. */
const REPORTS = 50;

export class Stream {
  #socket = null;
  #session = null;
  #after = -1; // the last chunk that is here with all its pictures
  #chunk = null; // the chunk whose pictures are being received
  #pictures = [];
  #tries = 0;
  #timers = { again: 0, silence: 0, report: 0 };
  #paused = false;
  #prompt = null; // asked for while there was no connection
  #played = { here: 0, told: 0 };
  #over = false;

  /** `init` is the first message. `on` has functions: state(name, details), started, back, applied, chunk(chunk, pictures),
   *  saved, stats, refused, done, failed. Each gets the server's message. */
  constructor(init, on) {
    this.init = { type: "init", media: "webp", ack: true, ...init };
    this.on = on;
  }

  /** Connect. */
  begin() {
    this.on.state("connecting");
    this.#connect();
  }

  prompt(text, how, id) {
    const message = { type: "prompt", prompt: text, how, id };
    if (!this.#say(message)) this.#prompt = message;
  }

  /** These keys are held from now on. Whether there is a connection to say so. */
  control(message) {
    return this.#say({ type: "control", ...message });
  }

  pause(on) {
    this.#paused = on;
    this.#say({ type: on ? "pause" : "resume" });
  }

  snapshot() {
    this.#say({ type: "snapshot" });
  }

  /** So many frames of the stream have been played. */
  played(frames) {
    this.#played.here = frames;
    if (this.#timers.report === 0) this.#timers.report = setTimeout(() => this.#report(), REPORTS);
  }

  #report() {
    clearTimeout(this.#timers.report);
    this.#timers.report = 0;
    const { here, told } = this.#played;
    if (here > told && this.#say({ type: "ack", frames: here })) this.#played.told = here;
  }

  /** End it, and listen no more. Without a connection it ends by itself after a while. */
  stop() {
    clearTimeout(this.#timers.again);
    this.#over = true;
    if (!this.#say({ type: "stop" })) this.#leave();
  }

  /** Try at once what would be tried later, or once more what was given up. */
  again() {
    this.#over = false;
    this.#tries = 0;
    clearTimeout(this.#timers.again);
    this.on.state(this.#session === null ? "connecting" : "reconnecting", { tries: 1, of: PAUSES.length, seconds: 0 });
    this.#connect();
  }

  async #connect() {
    let opened;
    try {
      opened = await socket();
    } catch (error) {
      if (this.#over) return;
      if (error instanceof Refused && error.status < 500) {
        this.#end(() => this.on.failed({ code: "refused", message: error.message, retryable: true }));
      } else this.#lost();
      return;
    }
    if (this.#over) return opened.close();
    this.#socket = opened;
    opened.binaryType = "arraybuffer";
    opened.onopen = () => {
      const known = { type: "init", session: this.#session, after: this.#after };
      this.#say(this.#session === null ? this.init : known);
    };
    opened.onmessage = ({ data }) => opened === this.#socket && this.#heard(data);
    opened.onclose = () => opened === this.#socket && this.#lost();
    this.#listen();
  }

  #listen() {
    clearTimeout(this.#timers.silence);
    this.#timers.silence = setTimeout(() => this.#lost(), SILENCE);
  }

  #lost() {
    this.#leave();
    if (this.#over) return;
    if (this.#tries === PAUSES.length) {
      const message = "The connection to the server was lost and did not come back.";
      this.#end(() => this.on.failed({ code: "unreachable", message, retryable: true }));
      return;
    }
    const pause = PAUSES[this.#tries];
    this.#tries += 1;
    this.on.state("reconnecting", { tries: this.#tries, of: PAUSES.length, seconds: pause / 1000 });
    this.#timers.again = setTimeout(() => this.#connect(), pause);
  }

  #leave() {
    const left = this.#socket;
    this.#socket = null;
    this.#chunk = null;
    clearTimeout(this.#timers.silence);
    left?.close();
  }

  #end(tell) {
    this.#over = true;
    clearTimeout(this.#timers.again);
    this.#leave();
    tell();
  }

  #say(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  #heard(data) {
    this.#listen();
    if (data instanceof ArrayBuffer) {
      if (this.#chunk === null) return;
      this.#pictures.push(data);
      if (this.#pictures.length === this.#chunk.messages) this.#complete();
      return;
    }
    const message = JSON.parse(data);
    switch (message.type) {
      case "queue":
        this.#tries = 0;
        this.on.state("queued", message);
        break;
      case "started":
        this.#started(message);
        break;
      case "chunk":
        this.#chunk = message;
        this.#pictures = [];
        if (message.messages === 0) this.#complete();
        break;
      case "error":
        if (message.fatal) this.#end(() => this.on.failed(message));
        else this.on.refused(message);
        break;
      case "done":
        this.#end(() => this.on.done(message));
        break;
      default: // applied, saved, stats
        this.on[message.type]?.(message);
    }
  }

  #started(message) {
    const first = this.#session === null;
    this.#session = message.session;
    this.#tries = 0;
    if (first) this.on.started(message);
    if (this.#prompt !== null && this.#say(this.#prompt)) this.#prompt = null;
    if (!first) this.#say({ type: this.#paused ? "pause" : "resume" });
    this.#played.told = 0;
    this.#report(); // what was played meanwhile, without which the server makes nothing more
    this.on.state("live");
    if (!first) this.on.back(message);
  }

  #complete() {
    const [chunk, pictures] = [this.#chunk, this.#pictures];
    this.#chunk = null;
    this.#after = chunk.index;
    this.on.chunk(chunk, pictures);
  }
}
