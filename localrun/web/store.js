// Keep the page's files on the device, so that the first visit is the only one that needs a network.

const { version, files } = self.EXPORT;
const NAME = `deepdistill-${version}`;

// Lets the service worker answer from now on, and reloads once if only then the page is isolated (see sw.js).
// Returns false if the browser cannot keep files: without https except on localhost, or in private browsing.
export async function openStore() {
  if (!("serviceWorker" in navigator) || !("caches" in self)) return false;
  try {
    await caches.open(NAME);
    await navigator.serviceWorker.register("sw.js", { updateViaCache: "none" });
    await navigator.serviceWorker.ready;
  } catch {
    return false;
  }
  if (!self.crossOriginIsolated && !sessionStorage.getItem("reloaded")) {
    sessionStorage.setItem("reloaded", "yes");
    self.addEventListener("pageshow", ({ persisted }) => persisted && location.reload()); // came here by going back
    location.reload();
    await new Promise(() => {});
  }
  return true;
}

// Returns a file as a Blob: from the cache, or else over the network, and then keeps it if it can.
export async function read(path, isKept, onBytes) {
  const url = new URL(path, location.href).href;
  const cache = isKept ? await caches.open(NAME) : null;
  const kept = await cache?.match(url);
  if (kept) {
    onBytes(files[path]);
    return kept.blob();
  }
  const response = await fetch(url, { cache: "no-store" });
  if (!response.ok) throw new Error(`${path}: the server answers ${response.status}`);
  const counter = new TransformStream({
    transform(bytes, controller) {
      onBytes(bytes.length);
      controller.enqueue(bytes);
    },
  });
  const { headers } = response;
  const counted = new Response(response.body.pipeThrough(counter), { headers: { "Content-Type": headers.get("Content-Type") ?? "" } });
  if (cache) await cache.put(url, counted);
  const blob = await (cache ? (await cache.match(url)).blob() : counted.blob());
  if (path in files && blob.size !== files[path]) {
    await cache?.delete(url);
    throw new Error(`${path} has ${blob.size} bytes instead of ${files[path]}: load the page again`);
  }
  return blob;
}

// Keeps the page itself last: from then on it starts without a network.
export async function finishStore(paths) {
  for (const path of paths) await read(path, true, () => {});
  for (const name of await caches.keys()) {
    if (name.startsWith("deepdistill-") && name !== NAME) await caches.delete(name);
  }
  await navigator.storage?.persist?.();
}
