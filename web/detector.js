// A detector in one ONNX file, which takes the picture itself (whole.py --from-picture), run by onnxruntime-web.

// Load a detector from the bytes of its file; `ort` is onnxruntime-web.
export async function load(ort, bytes) {
  const text = metadata(bytes).detector;
  if (!text) throw new Error("this file was not written by whole.py");
  const session = await ort.InferenceSession.create(bytes);
  if (!session.inputNames.includes("picture") || session.outputNames.includes("num_dets")) {
    throw new Error("this file has other inputs or outputs: write it with --from-picture alone");
  }
  return { classes: JSON.parse(text).classes, detect: (pixels) => detect(ort, session, pixels) };
}

// Find objects in pixels as a canvas has them: data (red, green, blue, alpha), width, height. Best first.
async function detect(ort, session, { data, width, height }) {
  const picture = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    picture[to++] = data[from + 2]; // OpenCV's order: blue, green, red
    picture[to++] = data[from + 1];
    picture[to++] = data[from];
  }
  const { boxes, scores, labels } = await session.run({ picture: new ort.Tensor("uint8", picture, [height, width, 3]) });
  return Array.from(scores.data, (score, i) => ({
    box: Array.from(boxes.data.slice(4 * i, 4 * i + 4)), // x1, y1, x2, y2 in pixels of the picture
    score,
    label: Number(labels.data[i]),
  }));
}

// Return the metadata of an ONNX file, which onnxruntime-web does not tell.
//
// The file is a protocol buffer: field after field, each with a key (its number and its kind), and if its kind is 2, a
// length and so many bytes. A model's metadata are its fields 14: each has a name, field 1, and a value, field 2.
function metadata(bytes) {
  const text = new TextDecoder();
  const entries = fields(bytes)
    .filter(({ number }) => number === 14)
    .map(({ content }) => Object.fromEntries(fields(content).map(({ number, content }) => [number, text.decode(content)])));
  return Object.fromEntries(entries.map((entry) => [entry[1], entry[2]]));
}

function fields(bytes) {
  const found = [];
  let place = 0;
  const varint = () => {
    let value = 0;
    for (let unit = 1; ; unit *= 128) {
      const byte = bytes[place++];
      if (byte === undefined) throw new Error("this is not an ONNX file");
      value += (byte % 128) * unit;
      if (byte < 128) return value;
    }
  };
  while (place < bytes.length) {
    const key = varint();
    const [number, kind] = [Math.floor(key / 8), key % 8];
    if (number === 0 || (kind !== 0 && kind !== 2)) throw new Error("this is not an ONNX file"); // a model has no others
    const length = varint();
    if (kind === 0) continue; // a number, not a length
    if (place + length > bytes.length) throw new Error("this file is not complete");
    found.push({ number, content: bytes.subarray(place, place + length) });
    place += length;
  }
  return found;
}
