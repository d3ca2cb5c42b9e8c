// A page that was opened from disk may start no worker, so that the site could not be searched. There the worker's script
// runs in a hidden frame of the page. The theme's offline plugin would fetch such a script from the net.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const page = this.inside.document
      page.open()
      page.write("<!doctype html><body>")
      page.close()
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      const script = page.createElement("script")
      script.src = url
      script.onload = () => {
        this.ready = true
        this.waiting.forEach(data => this.postMessage(data))
      }
      page.body.append(script)
    }

    postMessage(data) {
      if (!this.ready) this.waiting.push(data)
      else this.inside.dispatchEvent(new this.inside.MessageEvent("message", {data}))
    }
  }
}
