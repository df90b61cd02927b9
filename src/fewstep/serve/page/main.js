// The page: what its buttons and keys do.

import { keep, keysFrom, models, request } from "./api.js";
import { Clip } from "./clip.js";
import { Keys } from "./keys.js";
import { Meters } from "./meters.js";
import { Player } from "./player.js";
import { Settings, streams } from "./settings.js";
import { Stream } from "./stream.js";
import { View } from "./view.js";
import { Reel } from "./webp.js";

const find = (id) => document.getElementById(id);
const view = new View(find);
const reel = new Reel();
const player = new Player(find("canvas"), { shown, stalled, over, broken });
const meters = new Meters(find, player);
const settings = new Settings(find, chosen);
const keys = new Keys(find("keys"), (message) => stream?.control(message) ?? false);
const clip = new Clip(
  { title: find("clip-title"), note: find("clip-note"), overlay: find("clip-overlay"), progress: find("clip-progress"), video: find("clip-video") },
  { ended: clipEnded },
);

/** Chunks that a stream which is steered by keys may be ahead of the screen, so that it obeys soon. */
const STEERED = 2;

let stream = null; // the one that is watched
let asked = null; // what it was asked for
let began = 0; // when Start was pressed
let paused = false;
let slow = false; // whether the machine makes frames more slowly than they are played
let prompts = 0; // sent so far
let clipFrames = 0; // frames of the teacher's clip, until the stream has as many
let latest = ""; // prompt of the last chunk that came

keysFrom(askForKey);
find("order").addEventListener("submit", (event) => {
  event.preventDefault();
  if (stream === null) start();
  else change();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!find("go").disabled) find("order").requestSubmit();
});
find("pause").addEventListener("click", () => pause(!paused));
find("stop").addEventListener("click", stop);
find("snapshot").addEventListener("click", () => stream?.snapshot());
find("download").addEventListener("click", download);
find("compare").addEventListener("change", panels);
document.addEventListener("keydown", (event) => {
  // Arrow keys steer (keys.js).
  const typing = event.target.closest("input, textarea, select, button, summary, a, dialog, video");
  if (event.key !== " " || event.repeat || typing || find("pause").disabled) return;
  event.preventDefault();
  pause(!paused);
});
document.addEventListener("visibilitychange", () => {
  // A hidden tab draws nothing; what it does not show need not be made.
  if (document.hidden && !find("pause").disabled && !paused) pause(true, "Paused while this tab was hidden. Press Resume to go on.");
});
addEventListener("pagehide", () => stream !== null && stop()); // frees its place at once
load();

async function load() {
  view.state("loading");
  view.calm();
  try {
    let served = await models();
    while (served.length === 0) {
      await new Promise((resolve) => setTimeout(resolve, 1000));
      served = await models();
    }
    settings.offer(served);
    view.state("idle");
  } catch (error) {
    view.state("error");
    const message = error instanceof TypeError ? "This page cannot reach its server." : error.message;
    view.trouble({ code: "load", message, retryable: true }, load);
  }
}

function chosen(model) {
  find("clock").textContent = "";
  find("download").disabled = true;
  view.about(model, streams(model));
  keys.offer(model.keys);
  find("steering").hidden = model.keys.length === 0;
  view.examples(settings.examples, (prompt) => {
    find("prompt").value = prompt;
    find("prompt").focus();
  });
  if (find("prompt").value === "") find("prompt").value = settings.examples[0];
  panels();
}

/** Which of the two pictures are there. */
function panels() {
  const live = streams(settings.model);
  find("live").hidden = !live;
  find("charts").hidden = !live;
  find("clip").hidden = live && !settings.compares;
  find("clip-fair").hidden = !live;
  if (stream !== null) return;
  find("live-title").textContent = settings.model.id;
  find("clip-title").textContent = (live ? settings.teacher : settings.model)?.id ?? "";
  find("clip-overlay").textContent ||= live ? "The teacher makes the whole clip before it shows anything." : "The clip appears here.";
}

function start(more = {}) {
  const { model } = settings;
  if (model === undefined) return load();
  view.calm();
  find("applied").textContent = "";
  const prompt = find("prompt").value.trim();
  const { seed } = settings;
  asked = { model: model.id, prompt, seed, ...more };
  panels();
  find("clock").textContent = "";
  find("download").disabled = true;
  if (!streams(model)) {
    view.state("making");
    clip.make({ ...asked, steps: settings.steps });
    return;
  }
  began = performance.now();
  paused = false;
  find("live-note").textContent = find("live-times").textContent = "";
  delete find("canvas").dataset.prompt;
  view.overlay("Waiting for the first frame…");
  const mine = new Stream(
    { ...asked, steps: settings.steps, seconds: settings.seconds, ...(model.keys.length > 0 && { ahead: STEERED }) },
    heardBy(() => mine === stream, { state, started, back, applied, chunk, saved, stats, refused, done, failed }),
  );
  stream = mine;
  stream.begin();
  clipFrames = settings.compares ? settings.teacher.frames : 0;
  if (settings.compares) clip.make({ model: settings.teacher.id, prompt, seed, steps: settings.clipSteps });
}

/** The listeners, as long as a condition holds: news of a stream that was left are dropped. */
function heardBy(holds, listeners) {
  const guarded = (listen) => (...news) => holds() && listen(...news);
  return Object.fromEntries(Object.entries(listeners).map(([name, listen]) => [name, guarded(listen)]));
}

function change() {
  prompts += 1;
  find("applied").textContent = "Sent…";
  stream.prompt(find("prompt").value.trim(), find("how").value, String(prompts));
}

function pause(on, why) {
  paused = on;
  player.pause(on);
  stream.pause(on);
  view.state(on ? "paused" : "live", { why, slow });
}

function stop() {
  const left = stream;
  clip.cancel();
  player.stop();
  closed();
  if (left === null) view.state("idle");
  else view.state("ended", { frames: reel.frames });
  left?.stop();
}

// What the stream tells

function state(name, details) {
  view.state(name === "live" && paused ? "paused" : name, { slow, ...details });
}

function started(message) {
  slow = !message.realtime;
  player.begin(message);
  reel.begin(message);
  meters.begin(message);
  keys.begin();
  find("live-title").textContent = `${message.model}, ${message.steps} ${message.steps === 1 ? "step" : "steps"}`;
  const free = [document.body, find("go"), ...(message.keys.length > 0 ? [find("prompt")] : [])];
  if (free.includes(document.activeElement)) setTimeout(() => find("pause").focus());
}

function back() {
  keys.back();
}

function applied({ chunk, prompt }) {
  if (prompt === null) return keys.answered(chunk);
  find("applied").textContent = `“${shortened(prompt)}” applies from chunk ${chunk}.`;
}

function chunk(message, pictures) {
  latest = message.prompt;
  if (clipFrames > 0 && message.first + message.frames >= clipFrames) {
    find("live-times").textContent += `, ${clipFrames} frames after ${since(began)}`;
    clipFrames = 0;
  }
  meters.chunk(message);
  player.add(message, pictures);
}

function saved({ name, chunk }) {
  const { seed } = asked;
  const prompt = latest;
  view.snapshot(chunk, prompt, {
    "Go on from here": () => {
      stop();
      start({ snapshot: name, prompt, seed });
    },
    "Keep the file": async () => {
      try {
        keep(await (await request(`/v1/stream/snapshots/${name}`)).blob(), `stream-${chunk}.safetensors`);
      } catch (error) {
        view.trouble({ code: "snapshot", message: error.message, retryable: false });
      }
    },
  });
}

function stats(message) {
  meters.stats(message);
}

function refused({ message, id }) {
  if (id.startsWith("keys")) keys.answered(null);
  find("applied").textContent = message;
}

function done() {
  player.finish();
  if (document.body.dataset.state !== "live" && document.body.dataset.state !== "paused") over();
}

function failed(error) {
  const lost = stream;
  if (error.code === "unreachable") stream = null; // what is here is still shown
  else {
    player.stop();
    closed();
  }
  view.state("error");
  view.trouble(error, () => {
    if (error.code !== "unreachable") return start();
    stream = lost;
    lost.played(player.frames);
    lost.again();
  });
}

// What the player tells

function shown({ number, chunk: { index, pts, first, prompt, keys: held }, bytes }) {
  keys.show(held);
  if (reel.frames === 0) {
    meters.first(since(began));
    find("live-times").prepend(`first frame after ${since(began)}`); // the teacher's number of frames may be here already
    view.overlay("");
    find("download").disabled = false;
  }
  reel.add(bytes);
  stream?.played(number + 1);
  const seconds = pts + (number - first) / reel.fps;
  find("clock").textContent = `${seconds.toFixed(1)} s, chunk ${index}`;
  if (find("canvas").dataset.prompt === prompt) return;
  find("canvas").dataset.prompt = find("live-note").textContent = prompt;
  find("canvas").setAttribute("aria-label", `Video: ${prompt}`);
}

function stalled(yes) {
  document.body.classList.toggle("stalled", yes);
}

function over() {
  closed();
  view.state("ended", { frames: reel.frames });
  find("stop").disabled = !clip.busy;
}

function broken() {
  view.trouble({ code: "picture", message: "A picture from the server could not be read, and was left out.", retryable: false });
}

function closed() {
  stream = null;
  paused = false;
  meters.end();
  if (reel.frames === 0) view.overlay("The video appears here while it is being made.");
}

function clipEnded(error) {
  if (streams(settings.model)) {
    if (stream === null) find("stop").disabled = true;
    return;
  }
  find("download").disabled = error !== null;
  if (error === null) return view.state("made");
  view.state("error");
  view.trouble({ code: "clip", message: error.message, retryable: true }, () => start());
}

// The rest

const shortened = (text) => (text.length > 40 ? `${text.slice(0, 39).trimEnd()}…` : text);
const since = (start) => `${((performance.now() - start) / 1000).toFixed(2)} s`;

function download() {
  const name = asked.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60);
  if (streams(settings.model)) keep(reel.file(), `${name}.webp`);
  else keep(clip.file, `${name}.mp4`);
}

/** The key that the user gives; null: none. */
function askForKey(wrong) {
  const door = find("door");
  find("door-wrong").hidden = !wrong;
  find("key").value = "";
  door.returnValue = "";
  door.showModal();
  return new Promise((resolve) => {
    door.addEventListener("close", () => resolve(door.returnValue === "yes" ? find("key").value.trim() : null), { once: true });
  });
}
