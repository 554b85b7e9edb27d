// A mask: which pixels are brushed, with undo, and as a PNG file of one bit per pixel.

const KEPT = 100; // states that undo can return to

export class Mask {
  constructor(width, height) {
    Object.assign(this, { width, height, past: [], future: [] });
    this.data = new Uint8Array(width * height);
  }

  get area() {
    let sum = 0;
    for (const value of this.data) sum += value;
    return sum;
  }

  // Remembers the state before a change.
  begin() {
    this.past.push(this.data.slice());
    if (this.past.length > KEPT) this.past.shift();
    this.future = [];
  }

  undo() {
    if (!this.past.length) return false;
    this.future.push(this.data);
    this.data = this.past.pop();
    return true;
  }

  redo() {
    if (!this.future.length) return false;
    this.past.push(this.data);
    this.data = this.future.pop();
    return true;
  }

  set(data) {
    this.begin();
    this.data = Uint8Array.from(data, (value) => (value ? 1 : 0));
  }

  // A disc of this many pixels across, moved along a line of pixels [x, y].
  stroke([fromX, fromY], [toX, toY], size, value) {
    const steps = Math.max(Math.abs(toX - fromX), Math.abs(toY - fromY), 1);
    for (let step = 0; step <= steps; step++) {
      this.disc(Math.round(fromX + ((toX - fromX) * step) / steps), Math.round(fromY + ((toY - fromY) * step) / steps), size, value);
    }
  }

  disc(x, y, size, value) {
    // An even size has its center between pixels, so that its disc is as wide as it says.
    const radius = size / 2, middle = size % 2 ? 0 : 0.5;
    const reach = Math.ceil(radius);
    for (let down = -reach; down <= reach; down++) {
      for (let across = -reach; across <= reach; across++) {
        const inside = (down + middle) ** 2 + (across + middle) ** 2 <= radius ** 2;
        if (inside) this.put(x + across, y + down, value);
      }
    }
  }

  // All pixels between two corners, both included.
  rectangle([x0, y0], [x1, y1], value) {
    for (let y = Math.min(y0, y1); y <= Math.max(y0, y1); y++) {
      for (let x = Math.min(x0, x1); x <= Math.max(x0, x1); x++) this.put(x, y, value);
    }
  }

  put(x, y, value) {
    if (x >= 0 && y >= 0 && x < this.width && y < this.height) this.data[y * this.width + x] = value;
  }

  invert() {
    this.begin();
    this.data = this.data.map((value) => 1 - value);
  }

  clear() {
    this.begin();
    this.data = new Uint8Array(this.data.length);
  }

  // The mask as a PNG file: gray, one bit per pixel, brushed pixels are white.
  async png() {
    const line = Math.ceil(this.width / 8) + 1; // the first byte of a line names its filter: none
    const raw = new Uint8Array(line * this.height);
    this.data.forEach((value, at) => {
      const x = at % this.width, y = (at - x) / this.width;
      if (value) raw[y * line + 1 + (x >> 3)] |= 0x80 >> (x & 7);
    });
    const packed = new Blob([raw]).stream().pipeThrough(new CompressionStream("deflate"));
    const header = new DataView(new ArrayBuffer(13));
    header.setUint32(0, this.width);
    header.setUint32(4, this.height);
    header.setUint8(8, 1);
    return new Blob([
      Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a),
      chunk("IHDR", new Uint8Array(header.buffer)),
      chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
      chunk("IEND", new Uint8Array(0)),
    ], { type: "image/png" });
  }
}

function chunk(name, content) {
  const made = new Uint8Array(content.length + 12);
  const view = new DataView(made.buffer);
  view.setUint32(0, content.length);
  made.set([...name].map((letter) => letter.charCodeAt(0)), 4);
  made.set(content, 8);
  view.setUint32(content.length + 8, checksum(made.subarray(4, content.length + 8)));
  return made;
}

// CRC-32 of the PNG specification, annex D.
function checksum(content) {
  let sum = 0xffffffff;
  for (const byte of content) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = sum & 1 ? (sum >>> 1) ^ 0xedb88320 : sum >>> 1;
  }
  return (sum ^ 0xffffffff) >>> 0;
}

// The pixels of a picture file that are in a mask: its gray value, or where any pixel is transparent its opacity, is over
// half, as the program reads mask files. Throws if the file is no picture or has another size.
export async function readMask(blob, width, height) {
  let picture;
  try {
    picture = await createImageBitmap(blob, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new Error("the mask must be a picture file");
  }
  if (picture.width !== width || picture.height !== height) {
    throw new Error(`the mask must be ${width} × ${height} pixels like the picture, got ${picture.width} × ${picture.height}`);
  }
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  let transparent = false;
  for (let at = 3; at < data.length; at += 4) transparent ||= data[at] < 255;
  return Uint8Array.from({ length: width * height }, (_, at) => {
    const gray = 0.299 * data[4 * at] + 0.587 * data[4 * at + 1] + 0.114 * data[4 * at + 2];
    return (transparent ? data[4 * at + 3] : gray) > 127.5 ? 1 : 0;
  });
}

// Whether a site of a mask has a neighbor outside it.
export function onEdge(data, x, y, width, height) {
  const at = (column, row) => column >= 0 && row >= 0 && column < width && row < height && data[row * width + column];
  return !at(x - 1, y) || !at(x + 1, y) || !at(x, y - 1) || !at(x, y + 1);
}

// A PNG file from the server.
export function pngBlob(text) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
