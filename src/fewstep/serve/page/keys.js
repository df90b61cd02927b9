// Keys that steer a stream: on the keyboard and as buttons. Of a key that is pressed for a moment one chunk is told.

const SIGNS = { left: "←", right: "→", up: "↑", down: "↓" };
const ARROWS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" };
const TYPING = "input, textarea, select, video, dialog"; // elements that use arrow keys themselves

export class Keys {
  #buttons = new Map(); // by the name of the key
  #held = new Set();
  #pressed = new Set(); // since the server was last told
  #told = "";
  #waiting = false; // for the answer to what was sent
  #next = 0; // the first chunk that may be told something else
  #sent = 0;

  /** `pad` is the element for the buttons. `send(message)` sends a control, and says whether there was a connection. */
  constructor(pad, send) {
    Object.assign(this, { pad, send });
    document.addEventListener("keydown", (event) => {
      const name = ARROWS[event.key];
      if (!this.#buttons.has(name) || this.pad.disabled || event.target.closest(TYPING)) return;
      event.preventDefault();
      if (!event.repeat) this.#press(name);
    });
    document.addEventListener("keyup", (event) => this.#release(ARROWS[event.key]));
    addEventListener("blur", () => this.#buttons.forEach((_, name) => this.#release(name)));
  }

  /** The keys that the chosen model reads. */
  offer(names) {
    const buttons = names.map((name) => [name, this.#button(name)]);
    this.#buttons = new Map(buttons);
    this.pad.replaceChildren(...buttons.map(([, button]) => button));
  }

  /** A stream begins, for which no key is held. */
  begin() {
    this.#held.clear();
    this.#pressed.clear();
    this.#told = "";
    this.#next = 0;
    this.back();
    this.show([]);
  }

  /** The connection is there again: what was on its way is lost. */
  back() {
    if (this.#waiting) this.#told = null;
    this.#waiting = false;
    this.#tell();
  }

  /** The server has answered; `chunk` is the first one for which what was sent holds, null if it was refused. */
  answered(chunk) {
    this.#waiting = false;
    if (chunk !== null) this.#next = chunk + 1;
    this.#tell();
  }

  /** The keys that the frame on the screen was told of. */
  show(names) {
    for (const [name, button] of this.#buttons) button.classList.toggle("shown", names.includes(name));
  }

  #press(name) {
    this.#held.add(name);
    this.#pressed.add(name);
    this.#buttons.get(name).classList.add("held");
    this.#tell();
  }

  #release(name) {
    this.#buttons.get(name)?.classList.remove("held");
    if (this.#held.delete(name)) this.#tell();
  }

  #tell() {
    const keys = [...new Set([...this.#held, ...this.#pressed])].sort();
    if (this.#waiting || keys.join() === this.#told) return;
    this.#sent += 1;
    if (!this.send({ keys, chunk: this.#next, id: `keys ${this.#sent}` })) return;
    this.#told = keys.join();
    this.#pressed.clear();
    this.#waiting = true;
  }

  #button(name) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: SIGNS[name] ?? name });
    button.setAttribute("aria-label", `Key ${name}`);
    button.dataset.key = name;
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      this.#press(name);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => this.#release(name));
    button.addEventListener("click", ({ detail }) => {
      if (detail > 0) return; // a pointer, which was heard above
      this.#press(name);
      this.#release(name);
    });
    return button;
  }
}
