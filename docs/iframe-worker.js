// Search in a site that is opened from disk. Browsers start no worker from a file, so the page's
// search runs in a hidden frame that takes and sends the same messages.

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      // Functions of a worker, for the script that believes to be in one.
      inside.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        this.onmessage?.(event);
      };
      const load = (from) => new Promise((done, failed) => {
        const script = inside.document.createElement("script");
        Object.assign(script, { src: from, async: false, onload: done, onerror: failed });
        inside.document.head.append(script);
      });
      inside.importScripts = (...several) => Promise.all(several.map(load));
      this.ready = load(new URL(address, document.baseURI).href);
      this.ready.catch(() => this.dispatchEvent(new Event("error")));
    }

    postMessage(data) {
      this.ready.then(() => {
        const inside = this.frame.contentWindow;
        inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) }));
      }, () => {});
    }

    terminate() {
      this.frame.remove();
    }
  };
}
