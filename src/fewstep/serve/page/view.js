// What the page says: the state of the stream, what went wrong, and what to do about it.

const STATES = {
  idle: () => "Ready.",
  loading: () => "The server is loading its models…",
  connecting: () => "Connecting…",
  queued: ({ position }) => `In the queue, position ${position}. The stream begins when there is room.`,
  live: ({ slow }) => (slow ? "Live, slower than real time on this machine." : "Live."),
  paused: ({ why }) => why ?? "Paused.",
  reconnecting: ({ tries, of, seconds }) => `Connection lost. Try ${tries} of ${of}${seconds ? ` in ${seconds} s` : ""}…`,
  ended: ({ frames }) => `Ended after ${frames} frames. Press Start for another stream.`,
  making: () => "Making a clip.",
  made: () => "The clip is ready.",
  error: () => "Stopped.",
};

/** What to do about an error, besides what its message says: text of the button, or null for none. */
const ADVICE = {
  unreachable: ["Look whether the server runs and whether you are online.", "Connect again"],
  busy: ["", "Try again"],
  too_many_streams: ["", "Try again"],
  not_ready: ["", "Try again"],
  worker_lost: ["The prompt and the seed are still here.", "Start again"],
  internal_error: ["", "Start again"],
  out_of_memory: ["", "Try again"],
  idle: ["The prompt and the seed are still here.", "Start again"],
  no_session: ["The server ended it while you were away.", "Start again"],
  not_finite: ["", null],
  invalid_request: ["Change the settings, then press Start.", null],
  no_snapshot: ["", null],
  no_model: ["", null],
};

export class View {
  #advice = null;

  constructor(find) {
    this.find = find;
    find("trouble-button").addEventListener("click", () => {
      const advice = this.#advice;
      this.calm();
      advice?.();
    });
  }

  /** The state's name, by which the page also chooses colours and buttons. */
  state(name, details = {}) {
    document.body.dataset.state = name;
    this.find("state").textContent = STATES[name](details);
    const live = name === "live" || name === "paused";
    const busy = live || name === "reconnecting";
    const waits = name === "loading" || name === "connecting" || name === "queued";
    this.find("go").disabled = waits;
    this.find("go").textContent = busy ? "Change" : "Start";
    this.find("pause").disabled = !live;
    this.find("pause").textContent = name === "paused" ? "Resume" : "Pause";
    this.find("stop").disabled = !(busy || name === "connecting" || name === "queued" || name === "making");
    this.find("snapshot").disabled = !live;
    this.find("keys").disabled = !busy;
    this.find("settings").disabled = busy || waits || name === "making";
  }

  /** An error, and what to do. `again` is called when the button is pressed. */
  trouble({ code, message, retryable }, again) {
    const [advice, button] = ADVICE[code] ?? ["", retryable ? "Try again" : null];
    this.find("trouble-text").textContent = [sentence(message), advice].filter(Boolean).join(" ");
    this.find("trouble-button").textContent = button ?? "Close";
    this.#advice = button === null ? null : again;
    this.find("trouble").hidden = false;
  }

  /** No error any more. */
  calm() {
    this.find("trouble").hidden = true;
    this.#advice = null;
  }

  overlay(text) {
    this.find("overlay").textContent = text;
    this.find("overlay").hidden = text === "";
  }

  about(model, live) {
    const size = `${model.width} × ${model.height}, ${model.fps} frames per second`;
    this.find("about").textContent = `${model.id}: ${size}${live ? "" : ", whole clips"}`;
    this.find("licence").textContent = model.licence ? `Licence of ${model.id}: ${model.licence}` : "";
  }

  examples(prompts, pick) {
    const buttons = prompts.map((prompt) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
      button.addEventListener("click", () => pick(prompt));
      return button;
    });
    this.find("examples").replaceChildren(...buttons);
  }

  /** A snapshot that was written, with what can be done with it. */
  snapshot(chunk, prompt, actions) {
    const item = document.createElement("li");
    item.append(`Chunk ${chunk}: ${prompt} `);
    for (const [text, act] of Object.entries(actions)) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.setAttribute("aria-label", `${text}: snapshot at chunk ${chunk}`);
      button.addEventListener("click", act);
      item.append(button);
    }
    this.find("snapshots").prepend(item);
  }
}

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
