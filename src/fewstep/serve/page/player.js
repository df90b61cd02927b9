// Frames on a canvas, at the stream's own speed.

/** Pictures below this height are enlarged with hard edges: a world of 32 pixels is not blurred. */
const SMALL = 256;

export class Player {
  #queue = []; // frames that are decoded and not shown yet
  #decoding = Promise.resolve();
  #due = null; // when the next frame is to be shown, in milliseconds
  #shownAt = []; // when the frames of the last seconds were shown
  #paused = true;
  #finished = false; // no frames follow
  #begun = 0; // number of streams, so that pictures of an earlier one are dropped
  #fps = 1;
  frames = 0; // frames of the stream that were shown, or left out because the screen is slower than the stream
  stalls = 0; // how often it had to wait for frames

  /** `on` has functions: shown(frame), stalled(yes), over(), broken(). A frame has `number`, `chunk` and `bytes`. */
  constructor(canvas, on) {
    this.canvas = canvas;
    this.on = on;
    this.drawing = canvas.getContext("2d", { alpha: false });
    const tick = (now) => {
      this.#tick(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  begin({ fps, width, height }) {
    this.#drop();
    this.#begun += 1;
    this.#fps = fps;
    this.#due = null;
    this.#shownAt = [];
    this.#paused = this.#finished = this.stalling = false;
    this.frames = this.stalls = 0;
    Object.assign(this.canvas, { width, height });
    this.canvas.classList.toggle("small", height < SMALL);
  }

  /** The pictures of one chunk. They are decoded in their order. */
  add(chunk, pictures) {
    const begun = this.#begun;
    const images = Promise.allSettled(pictures.map((bytes) => createImageBitmap(new Blob([bytes], { type: "image/webp" }))));
    this.#decoding = this.#decoding.then(async () => {
      for (const [i, { value: image }] of (await images).entries()) {
        if (begun !== this.#begun) image?.close();
        else if (image === undefined) this.on.broken();
        else this.#queue.push({ number: chunk.first + i, chunk, bytes: pictures[i], image });
      }
    });
  }

  pause(on) {
    this.#paused = on;
    this.#due = null;
  }

  /** No frames follow: say so when the last one has been shown. */
  finish() {
    const begun = this.#begun;
    this.#decoding = this.#decoding.then(() => {
      this.#finished = begun === this.#begun;
    });
  }

  /** Show nothing more. */
  stop() {
    this.#drop();
    this.#begun += 1;
    this.#paused = true;
    this.#stall(false);
  }

  /** Seconds that can be shown without another chunk. */
  get lead() {
    return this.#queue.length / this.#fps;
  }

  /** Frames per second, over the last two seconds. */
  get rate() {
    const since = performance.now() - 2000;
    while (this.#shownAt.length > 0 && this.#shownAt[0] < since) this.#shownAt.shift();
    return this.#shownAt.length / 2;
  }

  #tick(now) {
    if (this.#paused) return;
    if (this.#queue.length === 0) {
      if (this.#due !== null && now < this.#due) return; // the time of the frame that is shown is not over
      this.#due = null;
      if (this.#finished) {
        this.#paused = true;
        this.on.over();
      } else if (this.frames > 0) this.#stall(true);
      return;
    }
    this.#stall(false);
    if (this.#due === null || now - this.#due > 1000) this.#due = now;
    let frame = null;
    while (this.#queue.length > 0 && now >= this.#due) {
      frame?.image.close();
      frame = this.#queue.shift();
      this.#due += 1000 / this.#fps;
      this.#shownAt.push(now);
      this.frames = frame.number + 1;
      this.on.shown(frame);
    }
    if (frame === null) return;
    this.drawing.drawImage(frame.image, 0, 0, this.canvas.width, this.canvas.height);
    frame.image.close();
  }

  #stall(yes) {
    if (yes === this.stalling) return;
    this.stalling = yes;
    if (yes) this.stalls += 1;
    this.on.stalled(yes);
  }

  #drop() {
    for (const { image } of this.#queue) image.close();
    this.#queue = [];
  }
}
