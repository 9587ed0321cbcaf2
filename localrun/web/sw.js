// Answer the page's requests from its cache, so that it works without a network; the page fills the cache with what
// files.js lists. The headers isolate the page from other origins: browsers give WebAssembly more than one thread only
// then, and a plain file server does not send them.

importScripts("files.js");
const { version } = self.EXPORT;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === self.location.origin) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(`deepdistill-${version}`);
  const response = (await cache.match(request, { ignoreSearch: true })) ?? (await overNetwork(request));
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

// After a new export, the old one stays complete in its own cache until the new one is complete.
async function overNetwork(request) {
  try {
    return await fetch(request);
  } catch (error) {
    const older = await caches.match(request, { ignoreSearch: true });
    if (older) return older;
    throw error;
  }
}
