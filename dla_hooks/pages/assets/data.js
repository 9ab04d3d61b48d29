// Numbers: bytes in the page become grids [row, entry] that are asked by `at`.

const ARRAYS = { f4: Float32Array, i4: Int32Array, i2: Int16Array, i1: Int8Array };
const NONE = { i2: -32768, i1: -128 };

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function gridOf({ type, shape: [n, m], start, scale }, buffer) {
  const array = new ARRAYS[type](buffer, start, n * m);
  if (!scale) return { n, m, rounded: false, at: (row, entry) => array[row * m + entry] };
  const none = NONE[type];
  const at = (row, entry) => {
    const step = array[row * m + entry];
    return step === none ? NaN : step * scale[entry];
  };
  return { n, m, rounded: true, at };
}

async function readContent() {
  const content = JSON.parse(document.getElementById("content").textContent);
  const buffer = await inflated(document.getElementById("numbers").textContent);
  content.pages = content.pages.map((page) => makePage(page, buffer));
  return content;
}
