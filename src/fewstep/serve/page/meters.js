// The measurements beside the video.

import { bars, line } from "./charts.js";

const KINDS = ["denoise_ms", "commit_ms", "decode_ms", "encode_ms"];
const LOOK = 500; // milliseconds between two points of a line

export class Meters {
  #chunks = [];
  #series = { rate: [], lead: [], memory: [] };
  #fps = 0;
  #frames = 0; // of a chunk
  #timer = 0;

  /** `find(id)` gives the page's elements, `player` is asked how it is. */
  constructor(find, player) {
    Object.assign(this, { find, player });
  }

  begin({ fps, chunk_frames: frames }) {
    this.#chunks = [];
    this.#series = { rate: [], lead: [], memory: [] };
    this.#fps = fps;
    this.#frames = frames.at(-1);
    for (const name of ["first", "rate", "chunk", "lead", "load", "kind0", "kind1", "kind2", "kind3"]) this.#say(name, "–");
    this.#say("others", "");
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#look(), LOOK);
  }

  end() {
    clearInterval(this.#timer);
  }

  first(time) {
    this.#say("first", time);
  }

  chunk(message) {
    const row = KINDS.map((kind) => message[kind]);
    const limit = (1000 * this.#frames) / this.#fps;
    this.#chunks = [...this.#chunks, row].slice(-30);
    bars(this.find("chunk-chart"), this.#chunks, { target: limit });
    const sum = row.reduce((total, value) => total + value, 0);
    this.#say("chunk", `${Math.round(sum)} of ${Math.round(limit)} ms`);
    row.forEach((value, kind) => this.#say(`kind${kind}`, `${Math.round(value)}`));
  }

  stats({ streams, waiting, load, memory }) {
    this.#say("load", `${Math.round(100 * load)} % busy`);
    this.#say("others", `${streams} ${streams === 1 ? "stream" : "streams"}, ${waiting} waiting`);
    this.find("memory-section").hidden = memory === 0;
    if (memory === 0) return;
    this.#say("memory", `${(memory / 2 ** 30).toFixed(2)} GiB`);
    this.#add("memory", memory, 0);
  }

  #look() {
    const { rate, lead, stalls } = this.player;
    const shown = rate >= 10 ? rate.toFixed(0) : rate.toFixed(1);
    this.#say("rate", `${shown} of ${this.#fps}${stalls ? `, ${stalls} ${stalls === 1 ? "wait" : "waits"}` : ""}`);
    this.#add("rate", rate, this.#fps);
    this.#say("lead", `${lead.toFixed(2)} s`);
    this.#add("lead", lead, 0);
  }

  #add(name, value, target) {
    this.#series[name] = [...this.#series[name], value].slice(-60);
    line(this.find(`${name}-chart`), this.#series[name], { target });
  }

  #say(name, text) {
    const element = this.find(name);
    if (element.textContent !== text) element.textContent = text;
  }
}
