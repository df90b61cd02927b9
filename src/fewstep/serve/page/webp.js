// What was seen, as one file: an animated WebP that holds the pictures of a stream as they came, so that nothing is lost.
// Format: https://developers.google.com/speed/webp/docs/riff_container

/** Bytes of pictures that are kept; the oldest ones are left out beyond that. */
const MOST = 256 * 2 ** 20;
const PICTURE = new Set(["VP8 ", "VP8L", "ALPH"]);

export class Reel {
  #pictures = [];
  #bytes = 0;
  cut = false; // whether the beginning was left out

  begin({ fps, width, height }) {
    Object.assign(this, { fps, width, height, cut: false });
    this.#pictures = [];
    this.#bytes = 0;
  }

  get frames() {
    return this.#pictures.length;
  }

  add(bytes) {
    this.#pictures.push(bytes);
    this.#bytes += bytes.byteLength;
    while (this.#bytes > MOST) {
      this.#bytes -= this.#pictures.shift().byteLength;
      this.cut = true;
    }
  }

  /** The file. */
  file() {
    const at = (frame) => Math.round((frame * 1000) / this.fps);
    const frames = this.#pictures.map((bytes, i) => {
      const head = [0, 0, this.width - 1, this.height - 1, at(i + 1) - at(i)].flatMap(three);
      return chunk("ANMF", [...head, 0b10], ...parts(bytes)); // 0b10: it replaces the frame before
    });
    const canvas = [0b10, 0, 0, 0, ...three(this.width - 1), ...three(this.height - 1)]; // 0b10: it is animated
    const body = new Blob(["WEBP", chunk("VP8X", canvas), chunk("ANIM", [0, 0, 0, 255, 0, 0]), ...frames]);
    return new Blob(["RIFF", new Uint8Array(four(body.size)), body], { type: "image/webp" });
  }
}

/** The parts of a picture's file that hold the picture. */
function parts(bytes) {
  const view = new DataView(bytes);
  const found = [];
  for (let at = 12; at + 8 <= bytes.byteLength; ) {
    const name = String.fromCharCode(...new Uint8Array(bytes, at, 4));
    const end = at + 8 + view.getUint32(at + 4, true);
    const padded = end + (end % 2);
    if (PICTURE.has(name)) found.push(new Uint8Array(bytes, at, Math.min(padded, bytes.byteLength) - at));
    at = padded;
  }
  return found;
}

/** A chunk of the file. The parts of pictures are padded already, and a head has an even length. */
function chunk(name, head, ...rest) {
  const size = head.length + rest.reduce((sum, part) => sum + part.length, 0);
  return new Blob([name, new Uint8Array(four(size)), new Uint8Array(head), ...rest]);
}

const three = (n) => [n & 255, (n >> 8) & 255, (n >> 16) & 255];
const four = (n) => [...three(n), (n >>> 24) & 255];
