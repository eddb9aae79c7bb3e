// A reader of .mssr files, written from format.md alone. It needs nothing but a Zstandard decoder: Node's (22.15, 23.8 or
// newer), or the program zstd.
//
//     node read_mssr.mjs FILE.mssr                          prints the header
//     node read_mssr.mjs FILE.mssr LEVEL OUT.safetensors    writes a level: float32 weights, and the other tensors as they are
//
// As a module: readHeader(bytes) and readLevel(bytes, level), bytes being a Uint8Array of the file or a prefix of it.

import { spawnSync } from 'node:child_process';
import { readFileSync, realpathSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import zlib from 'node:zlib';

const ITEM_SIZE = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 };
const isFloat = (dtype) => dtype.includes('F');
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const align = (offset) => Math.ceil(offset / 64) * 64;
const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function require(holds, problem) {
  if (!holds) throw new Error(problem);
}

// ---------------------------------------- header ---------------------------------------- //

// The header's object; each of its sections gets its level, its start and its end.
export function readHeader(bytes) {
  const view = viewOf(bytes);
  const magic = [0x89, 0x4d, 0x53, 0x53, 0x52, 0x0d, 0x0a, 0x1a];
  require(bytes.length >= 24 && magic.every((byte, i) => bytes[i] === byte), 'not a .mssr file');
  require(view.getUint16(8, true) === 2, `major version ${view.getUint16(8, true)}; this program reads 2`);
  const length = view.getUint32(12, true);
  require(length <= 2 ** 20 && 24 + length <= bytes.length, 'the header is cut short');
  const frame = bytes.subarray(24, 24 + length);
  require(xxh64(frame) === view.getBigUint64(16, true), 'the header is corrupted');
  const header = JSON.parse(new TextDecoder().decode(decompress(frame, 2 ** 15 + 32 * length)));
  let end = 24 + length;
  header.sections.forEach((section, i) => {
    section.level = header.sections.length - 1 - i;
    section.start = align(end);
    section.end = end = section.start + section.bytes;
  });
  return header;
}

// ---------------------------------------- levels ---------------------------------------- //

// {name: {dtype, shape, data}} of a level, data being little-endian and row-major.
export function readLevel(bytes, level) {
  const header = readHeader(bytes);
  const smallest = header.sections.length - 1;
  const known = Number.isInteger(level) && 0 <= level && level <= smallest;
  require(known, `level ${level}: this model has levels 0 to ${smallest}`);
  const weights = header.weights.map(([name, shape]) => {
    const elements = product(shape);
    return { name, shape, perChannel: elements / (shape[0] || 1), data: new Float32Array(elements), taken: new Uint8Array(elements) };
  });
  const tensors = {};
  let scales = null;
  for (const [i, section] of header.sections.entries()) {
    if (section.level < level) break;
    require(section.end <= bytes.length, `level ${level} needs the first ${section.end} bytes`);
    const frame = bytes.subarray(section.start, section.end);
    require(xxh64(frame).toString(16).padStart(16, '0') === section.xxh64, `level ${section.level} is corrupted`);
    const candidates = weights.map(({ taken }) => Array.from(taken.keys()).filter((element) => !taken[element]));
    const total = sum(weights.map(({ data }) => data.length)) + sum(header.others.map(([, shape]) => product(shape)));
    const content = decompress(frame, 16 * total);
    let at = 0;
    const take = (count, dtype) => {
      require(at + count * ITEM_SIZE[dtype] <= content.length, 'a section is cut short');
      return joinPlanes(content.subarray(at, (at += count * ITEM_SIZE[dtype])), count, dtype);
    };

    const order = codingOrder(section.counts, candidates.map((numbers) => numbers.length));
    const chosen = [];
    for (const w of order) {
      const [numbers, next] = readPositions(content, at, section.counts[w], candidates[w].length);
      chosen.push(numbers.map((number) => candidates[w][number]));
      at = next;
    }
    if (i === 0 && header.dtype === 'I8') {
      const flat = asFloats(take(sum(weights.map(({ shape }) => shape[0])), 'BF16'), 'BF16');
      let from = 0;
      scales = weights.map(({ shape }) => flat.subarray(from, (from += shape[0])));
    }
    const values = asFloats(take(sum(section.counts), header.dtype), header.dtype);
    let from = 0;
    order.forEach((w, j) => {
      const { data, taken, perChannel } = weights[w];
      for (const element of chosen[j]) {
        const scale = scales === null ? 1 : scales[w][Math.floor(element / perChannel)];
        data[element] = values[from++] * scale;
        taken[element] = 1;
      }
    });
    if (i === 0) Object.assign(tensors, readOthers(header.others, take));
    require(at === content.length, 'a section has bytes of no use');
  }
  for (const { name, shape, data } of weights) tensors[name] = { dtype: 'F32', shape, data: new Uint8Array(data.buffer) };
  return tensors;
}

function readOthers(others, take) {
  const tensors = {};
  for (const dtype of new Set(others.map((other) => other[2]))) {
    const infos = others.filter((other) => other[2] === dtype);
    const data = take(sum(infos.map(([, shape]) => product(shape))), dtype);
    let from = 0;
    for (const [name, shape] of infos) {
      tensors[name] = { dtype, shape, data: data.slice(from, (from += product(shape) * ITEM_SIZE[dtype])) };
    }
  }
  return tensors;
}

function codingOrder(counts, candidates) {
  const share = counts.map((c, i) => (candidates[i] ? Math.min(c, candidates[i] - c) / candidates[i] : 0));
  return [...counts.keys()].sort((a, b) => share[a] - share[b] || a - b);
}

// The numbers of the c candidates of n that are chosen, and where in the content they end.
function readPositions(content, at, c, n) {
  if (c === 0) return [[], at];
  const all = [...Array(n).keys()];
  if (c === n) return [all, at];
  if (4 * c < n || 4 * (n - c) < n) {
    const stated = [];
    for (let number = 0; stated.length < Math.min(c, n - c); ) {
      require(at < content.length, 'a section is cut short');
      const byte = content[at++];
      number += byte;
      if (byte < 255) stated.push(number);
      require(number < n + 255, 'a position is beyond its layer');
    }
    require(stated.every((number, i) => number < n && (i === 0 || number > stated[i - 1])), 'positions do not ascend');
    if (4 * c < n) return [stated, at];
    const left = new Set(stated);
    return [all.filter((number) => !left.has(number)), at];
  }
  const chosen = all.filter((number) => (content[at + (number >> 3)] >> (7 - (number & 7))) & 1);
  require(chosen.length === c, 'a layer does not have as many positions as the header says');
  return [chosen, at + Math.ceil(n / 8)];
}

// The little-endian elements whose planes, the most significant bytes first, these are.
function joinPlanes(planes, count, dtype) {
  const size = ITEM_SIZE[dtype];
  const elements = new Uint8Array(count * size);
  for (let i = 0; i < count; i++) {
    let carry = isFloat(dtype) ? (planes[(size - 1) * count + i] & 1) << 7 : 0; // the sign, which stands last
    for (let plane = 0; plane < size; plane++) {
      const byte = planes[plane * count + i];
      elements[i * size + size - 1 - plane] = isFloat(dtype) ? (byte >> 1) | carry : byte;
      carry = (byte & 1) << 7;
    }
  }
  return elements;
}

function asFloats(elements, dtype) {
  const view = viewOf(elements);
  const read = {
    F32: (i) => view.getFloat32(4 * i, true),
    F16: (i) => halfToNumber(view.getUint16(2 * i, true)),
    BF16: (i) => bfloatToNumber(view.getUint16(2 * i, true)),
    I8: (i) => view.getInt8(i),
  }[dtype];
  return Float32Array.from({ length: elements.length / ITEM_SIZE[dtype] }, (_, i) => read(i));
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

function bfloatToNumber(bits) {
  return new Float32Array(new Uint32Array([bits << 16]).buffer)[0];
}

// ---------------------------------------- Zstandard and XXH64 ---------------------------------------- //

function decompress(frame, longest) {
  if (zlib.zstdDecompressSync) return new Uint8Array(zlib.zstdDecompressSync(frame, { maxOutputLength: longest + 1 }));
  const done = spawnSync('zstd', ['--decompress', '--stdout'], { input: frame, maxBuffer: longest + 1 });
  require(done.error?.code !== 'ENOENT', 'a Zstandard decoder is needed: Node 22.15 or newer, or the program zstd');
  require(done.status === 0, `zstd: ${done.error ?? done.stderr}`);
  return new Uint8Array(done.stdout);
}

const MASK = (1n << 64n) - 1n;
const [P1, P2, P3, P4, P5] = [
  0x9e3779b185ebca87n, 0xc2b2ae3d27d4eb4fn, 0x165667b19e3779f9n, 0x85ebca77c2b2ae63n, 0x27d4eb2f165667c5n,
];
const rotate = (x, bits) => ((x << bits) | (x >> (64n - bits))) & MASK;
const round = (state, input) => (rotate((state + input * P2) & MASK, 31n) * P1) & MASK;

export function xxh64(bytes) {
  const view = viewOf(bytes);
  let at = 0;
  let hash = P5;
  if (bytes.length >= 32) {
    const lanes = [(P1 + P2) & MASK, P2, 0n, -P1 & MASK];
    for (; at + 32 <= bytes.length; at += 32) {
      for (let i = 0; i < 4; i++) lanes[i] = round(lanes[i], view.getBigUint64(at + 8 * i, true));
    }
    hash = [1n, 7n, 12n, 18n].reduce((total, bits, i) => total + rotate(lanes[i], bits), 0n) & MASK;
    for (const lane of lanes) hash = ((hash ^ round(0n, lane)) * P1 + P4) & MASK;
  }
  hash = (hash + BigInt(bytes.length)) & MASK;
  for (; at + 8 <= bytes.length; at += 8) {
    hash = (rotate(hash ^ round(0n, view.getBigUint64(at, true)), 27n) * P1 + P4) & MASK;
  }
  if (at + 4 <= bytes.length) {
    hash = (rotate(hash ^ ((BigInt(view.getUint32(at, true)) * P1) & MASK), 23n) * P2 + P3) & MASK;
    at += 4;
  }
  for (; at < bytes.length; at++) hash = (rotate(hash ^ ((BigInt(bytes[at]) * P5) & MASK), 11n) * P1) & MASK;
  hash = ((hash ^ (hash >> 33n)) * P2) & MASK;
  hash = ((hash ^ (hash >> 29n)) * P3) & MASK;
  return hash ^ (hash >> 32n);
}

// ---------------------------------------- command line ---------------------------------------- //

function toSafetensors(tensors) {
  const table = {};
  let end = 0;
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    table[name] = { dtype, shape, data_offsets: [end, (end += data.length)] };
  }
  const text = new TextEncoder().encode(JSON.stringify(table));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, ...Object.values(tensors).map(({ data }) => data)]);
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const [file, level, output, ...more] = process.argv.slice(2);
  const complete = file !== undefined && (level === undefined) === (output === undefined) && more.length === 0;
  require(complete, 'usage: node read_mssr.mjs FILE.mssr [LEVEL OUT.safetensors]');
  const bytes = new Uint8Array(readFileSync(file));
  if (output === undefined) console.log(JSON.stringify(readHeader(bytes), null, 2));
  else writeFileSync(output, toSafetensors(readLevel(bytes, /^\d+$/.test(level) ? Number(level) : level)));
}
