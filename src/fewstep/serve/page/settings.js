// What is asked of the server: the model, its steps, the seed and the length.

/** Prompts that the built-in world knows, whose videos are tiny, and prompts for models of real videos. */
const EXAMPLES = {
  world: [
    "a large red circle moves slowly right over a navy background",
    "a small yellow star moves quickly up-left over a black background",
    "a large cyan ring moves slowly down over a maroon background",
    "a large green square moves quickly left over a sand background",
  ],
  real: [
    "A paper boat drifts down a rain-filled gutter, close-up",
    "A lighthouse on a cliff at dusk, waves below, the camera circles",
    "A fox walks through fresh snow in a birch forest",
    "Steam rises from a cup of tea on a windowsill, morning light",
  ],
};
/** What the ways to change a prompt do, in the order in which they are offered. */
const CHANGES = {
  keep: "keep what was seen",
  lerp: "blend over 4 chunks",
  recache: "see the past anew",
  clear: "forget what was seen",
};
const WORLD = 64; // pixels of height up to which a model counts as one of the world

export const streams = (model) => model.chunk_frames.length > 0;

export class Settings {
  #models = [];

  /** `find(id)` gives the page's elements. `changed()` is called when another model is chosen. */
  constructor(find, changed) {
    this.find = find;
    find("model").addEventListener("change", () => this.#chosen(changed));
    this.changed = changed;
  }

  offer(models) {
    this.#models = models;
    const select = this.find("model");
    select.replaceChildren(...models.map(({ id }) => new Option(id)));
    const first = models.findIndex(streams);
    select.selectedIndex = Math.max(0, first);
    this.#chosen(this.changed);
  }

  /** The model that is chosen; undefined while none is known. */
  get model() {
    return this.#models[this.find("model").selectedIndex];
  }

  /** The model without streams that is shown beside it: a teacher rather than another one. */
  get teacher() {
    if (!this.model || !streams(this.model)) return undefined;
    const others = this.#models.filter((model) => !streams(model));
    return others.find(({ role }) => role === "teacher") ?? others[0];
  }

  get compares() {
    return this.teacher !== undefined && this.find("compare").checked;
  }

  get seed() {
    return this.find("seed").valueAsNumber || 0;
  }

  /** Steps of the chosen model. */
  get steps() {
    const picked = this.find("steps").querySelector("input:checked");
    return picked ? Number(picked.value) : this.clipSteps;
  }

  /** Steps of a model that can be sampled in any number of them. */
  get clipSteps() {
    return this.find("any-steps-count").valueAsNumber || 50;
  }

  get seconds() {
    const { value } = this.find("seconds");
    return value === "" ? null : Number(value);
  }

  #chosen(changed) {
    const { model, teacher, find } = this;
    const live = streams(model);
    const choices = model.steps.map((count, i) => choice(count, i === 0));
    find("steps").replaceChildren(find("steps").querySelector("legend"), ...choices);
    find("steps").hidden = choices.length === 0;
    find("any-steps").hidden = choices.length > 0 && !teacher;
    find("models").hidden = this.#models.length === 1;
    find("length").hidden = !live;
    const ways = Object.keys(CHANGES).filter((way) => model.switches.includes(way));
    find("how").replaceChildren(...ways.map((way) => new Option(CHANGES[way], way)));
    find("change").hidden = ways.length < 2;
    find("compare-field").hidden = !teacher;
    find("teacher").textContent = teacher ? `Compare with ${teacher.id} in` : "";
    changed(model);
  }

  /** Example prompts for the chosen model. */
  get examples() {
    if (this.model.height > WORLD) return EXAMPLES.real;
    const steered = this.model.keys.length > 0; // then keys say how it moves
    return steered ? EXAMPLES.world.map((text) => text.replace(/ moves \S+ \S+/, "")) : EXAMPLES.world;
  }
}

function choice(count, checked) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "steps", value: count, checked });
  label.append(input, String(count));
  return label;
}
