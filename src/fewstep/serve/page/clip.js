// A clip, made as a job: asked for, watched while it is made, then played.

import { Refused, request } from "./api.js";

/** Milliseconds between two looks at a job. */
const LOOK = 250;

export class Clip {
  #number = 0; // of the job that is shown, so that the news of an earlier one are dropped
  #job = null;

  /** `view` has the elements title, note, overlay, progress and video. `on.ended(error)` is called when nothing follows. */
  constructor(view, on) {
    this.view = view;
    this.on = on;
  }

  get busy() {
    return this.#job !== null;
  }

  /** Ask for a clip, and show how far it is. Its model is one without streams, or any other. */
  async make({ model, prompt, seed, steps }) {
    await this.cancel();
    const number = (this.#number += 1);
    const shown = () => number === this.#number;
    const { view } = this;
    const began = performance.now();
    view.title.textContent = `${model}, ${steps} steps`;
    this.#show("Waiting…", "");
    view.progress.hidden = false;
    view.progress.removeAttribute("value");
    try {
      const body = { model, prompt, seed, num_inference_steps: steps };
      let job = await (await request("/v1/videos", { method: "POST", body })).json();
      this.#job = job.id;
      while (shown() && (job.status === "queued" || job.status === "in_progress")) {
        this.#making(job, steps, (performance.now() - began) / 1000);
        await new Promise((resolve) => setTimeout(resolve, LOOK));
        if (shown()) job = await (await request(`/v1/videos/${job.id}`)).json();
      }
      if (!shown()) return;
      if (job.status !== "completed") throw new Error(job.error?.message ?? `The clip was not made (${job.status}).`);
      const seconds = (performance.now() - began) / 1000;
      const file = await (await request(`/v1/videos/${job.id}/content`)).blob();
      if (shown()) this.#play(file, `finished after ${seconds.toFixed(1)} s`);
    } catch (error) {
      if (shown()) this.#failed(error);
    }
  }

  /** Give up what is being made. */
  async cancel() {
    this.#number += 1;
    const job = this.#job;
    this.#job = null;
    this.file = null;
    this.view.video.hidden = true;
    this.view.progress.hidden = true;
    this.#show("", "");
    if (job === null) return;
    try {
      await request(`/v1/videos/${job}`, { method: "DELETE" });
    } catch {
      // it is gone already
    }
  }

  #making(job, steps, seconds) {
    const { progress } = this.view;
    const waits = job.status === "queued";
    // Decoding counts as one more step.
    const step = Math.min(steps, Math.round(((job.progress ?? 0) / 100) * (steps + 1)));
    if (!waits) progress.value = job.progress ?? 0;
    this.#show(waits ? "Waiting…" : `step ${step} of ${steps}`, `${seconds.toFixed(0)} s`);
  }

  #play(file, note) {
    const { video, progress } = this.view;
    this.file = file;
    this.#job = null;
    if (video.src) URL.revokeObjectURL(video.src);
    video.src = URL.createObjectURL(file);
    video.onloadedmetadata = () => video.classList.toggle("small", video.videoHeight < 256);
    video.hidden = false;
    progress.hidden = true;
    this.#show("", note);
    video.play().catch(() => (video.controls = true));
    this.on.ended(null);
  }

  #failed(error) {
    this.#job = null;
    this.view.progress.hidden = true;
    const missing = error instanceof Refused && (error.status === 404 || error.status === 405);
    const text = missing ? "This server makes no clips." : error.message;
    this.#show(text, "");
    this.on.ended(missing ? new Error(text) : error);
  }

  #show(overlay, note) {
    this.view.overlay.textContent = overlay;
    this.view.note.textContent = note;
  }
}
