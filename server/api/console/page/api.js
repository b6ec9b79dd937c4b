// Calls the public HTTP API with the key of this tab. The key is sent as a header and is in no address.

const KEY = "multilora.key";
const TENANT = "multilora.tenant";
const TENANT_KEYS_BEGIN = "ml-";
const ADMIN_KEYS_BEGIN = "ml-admin-";

/** An answer that is not a success, in the API's own words. */
export class Refused extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: error.code ?? "error", param: error.param ?? null });
  }
}

export const session = {
  get key() {
    return sessionStorage.getItem(KEY);
  },
  get tenant() {
    return sessionStorage.getItem(TENANT);
  },
  get known() {
    return Boolean(this.key || this.tenant);
  },
  /** Whether tenants have no keys. */
  get isOpen() {
    return document.documentElement.dataset.auth === "off";
  },
  /** By its form: tenants' keys begin with "ml-"; an operator may have chosen any other. The server decides. */
  get isAdmin() {
    return Boolean(this.key) && (this.key.startsWith(ADMIN_KEYS_BEGIN) || !this.key.startsWith(TENANT_KEYS_BEGIN));
  },
  open(key, tenant) {
    for (const [name, value] of [[KEY, key], [TENANT, tenant]]) {
      if (value) sessionStorage.setItem(name, value);
      else sessionStorage.removeItem(name);
    }
  },
  close() {
    sessionStorage.removeItem(KEY);
    sessionStorage.removeItem(TENANT);
  },
};

function headers(tenant) {
  const own = {};
  if (session.key) own.authorization = `Bearer ${session.key}`;
  if (tenant ?? session.tenant) own["x-tenant-id"] = tenant ?? session.tenant;
  return own;
}

async function answered(response) {
  if (response.ok) return response;
  throw new Refused(response.status, await response.json().catch(() => null));
}

/** The JSON of an answer. Raises Refused. tenant: the one that an operator acts for. */
export async function call(method, path, { json, signal, tenant } = {}) {
  const own = headers(tenant);
  if (json !== undefined) own["content-type"] = "application/json";
  const body = json === undefined ? undefined : JSON.stringify(json);
  const response = await answered(await fetch(path, { method, headers: own, body, signal, cache: "no-store" }));
  return response.json();
}

export const get = (path, options) => call("GET", path, options);
export const post = (path, json, options) => call("POST", path, { json, ...options });

/** The file that a route answers. */
export async function download(path) {
  return (await answered(await fetch(path, { headers: headers(), cache: "no-store" }))).blob();
}

/** Prometheus text; open to all, so it takes no key. */
export async function metricsText(signal) {
  return (await answered(await fetch("metrics", { signal, cache: "no-store" }))).text();
}

/** Opens a stream of server-sent events: `{ head, chunks }`, an answer's headers and its parsed events. */
export async function stream(path, json, signal) {
  const own = { ...headers(), "content-type": "application/json" };
  const response = await answered(await fetch(path, { method: "POST", headers: own, body: JSON.stringify(json), signal }));
  return { head: response.headers, chunks: parsed(response.body) };
}

async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const line of parts.flatMap((part) => part.split("\n"))) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(0, event);
      yield event;
    }
  }
}

/** Sends a form and says how far it is, 0 to 1. `fetch` cannot report this. */
export function upload(path, form, { onProgress, signal, tenant } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers(tenant))) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => onProgress?.(event.loaded / event.total));
    request.addEventListener("error", () => reject(new TypeError("the connection was closed")));
    request.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError")));
    request.addEventListener("load", () => {
      const body = textAsJson(request.responseText);
      if (request.status < 300) resolve(body);
      else reject(new Refused(request.status, body));
    });
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

function textAsJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Every object of a list, page after page, up to `most`. */
export async function all(path, { most = 1000, signal } = {}) {
  const found = [];
  let after = "";
  while (found.length < most) {
    const page = await get(`${path}${path.includes("?") ? "&" : "?"}limit=100${after}`, { signal });
    found.push(...page.data);
    if (!page.has_more) break;
    after = `&after=${encodeURIComponent(page.last_id)}`;
  }
  return found;
}

/** A part of a path. A reference keeps its slash: tenant/name. */
export const inPath = (ref) => ref.split("/").map(encodeURIComponent).join("/");
