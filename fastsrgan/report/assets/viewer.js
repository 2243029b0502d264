// Linked views of the page's volumes: by NiiVue where there is WebGL 2, else on 2-D canvases by the code below.
// All volumes share one grid whose axes point to R, A and S, so a place is three voxel numbers.
"use strict";
(() => {
  const holder = document.getElementById("viewer");
  if (!holder) return;
  const plan = JSON.parse(document.getElementById("plan").textContent);
  const [NX, NY, NZ] = plan.shape;
  const PLANES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] }; // across, up, through
  const ENDS = ["LR", "PA", "IS"];
  const THIN = 0.4; // voxels that NiiVue's crosshair is wide
  const COLOURS = { seg: [34, 211, 238], label: [251, 191, 36] };
  const DARKER = [96, 165, 250], BRIGHTER = [248, 113, 113]; // ends of the colours of a difference; nothing is black
  const DOUBT = [[0, 0, 0], [192, 38, 211], [254, 240, 138]]; // none, half, and where its colours end
  const MARK = "#facc15"; // of the slice
  const SOFTWARE = /swiftshader|llvmpipe|softpipe|software|basic render/i; // names of drivers without a graphics card
  const state = { at: plan.start.slice(), plane: plan.plane, zoom: 1, overlay: 0.5, wipe: 0.5, cross: true, layer: "none", marks: true };
  const $ = (id) => document.getElementById(id);

  // --- volumes ---------------------------------------------------------------------------------------------------

  async function inflate(id) {
    const text = atob($(id).textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function readVolumes() {
    const volumes = {};
    for (const { name, minus } of plan.volumes) {
      const data = await inflate("volume-" + name);
      if (data.length !== NX * NY * NZ) throw new Error("volume " + name + " has a wrong size");
      if (minus) {
        const other = volumes[minus];
        for (let i = 0; i < data.length; i++) data[i] += other[i];
      } else {
        for (let row = 0; row < data.length; row += NX) for (let i = row + 1; i < row + NX; i++) data[i] += data[i - 1];
      }
      volumes[name] = data;
    }
    // A difference is 128 where there is none, 1 and 255 at the ends of its colours.
    for (const [name, [first, second]] of Object.entries(plan.differences)) {
      const a = volumes[first], b = volumes[second], out = new Uint8Array(NX * NY * NZ);
      for (let i = 0; i < out.length; i++) out[i] = 128 + Math.round(127 * clamp((a[i] - b[i]) / plan.limit, -1, 1));
      volumes[name] = out;
    }
    return volumes;
  }

  function nifti(data) {
    const buffer = new ArrayBuffer(352 + data.length);
    const head = new DataView(buffer);
    head.setInt32(0, 348, true);
    [3, NX, NY, NZ, 1, 1, 1, 1].forEach((n, i) => head.setInt16(40 + 2 * i, n, true));
    head.setInt16(70, 2, true); // uint8
    head.setInt16(72, 8, true);
    [1, ...plan.spacing, 1, 1, 1, 1].forEach((n, i) => head.setFloat32(76 + 4 * i, n, true));
    head.setFloat32(108, 352, true);
    head.setFloat32(112, 1, true);
    head.setUint8(123, 2); // mm
    head.setInt16(254, 1, true);
    plan.shape.forEach((n, d) => {
      head.setFloat32(280 + 16 * d + 4 * d, plan.spacing[d], true);
      head.setFloat32(280 + 16 * d + 12, -plan.spacing[d] * (n - 1) / 2, true);
    });
    [0x6e, 0x2b, 0x31, 0].forEach((c, i) => head.setUint8(344 + i, c));
    new Uint8Array(buffer, 352).set(data);
    return buffer;
  }

  // Voxels of a mask with a neighbour outside it in the plane that is shown.
  function rim(data) {
    const [u, v] = PLANES[state.plane];
    const strides = [1, NX, NX * NY], across = strides[u], up = strides[v];
    const edge = new Uint8Array(data.length);
    for (let i = 0; i < data.length; i++) {
      edge[i] = data[i] && !(data[i - across] && data[i + across] && data[i - up] && data[i + up]) ? 1 : 0;
    }
    return edge;
  }

  const middle = (d) => (plan.shape[d] - 1) / 2;
  const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
  const signed = (v) => (v < 128 ? DARKER : BRIGHTER).map((c) => Math.round(c * Math.abs(v - 128) / 127));
  const heat = (v) => {
    const [low, high] = v < 128 ? [DOUBT[0], DOUBT[1]] : [DOUBT[1], DOUBT[2]], part = v < 128 ? v / 128 : (v - 128) / 127;
    return low.map((c, i) => Math.round(c + part * (high[i] - c)));
  };
  // Over the SR only the chosen layer is seen, over the segmentation's pane all are; an outline is stronger than a fill.
  const opacity = (pane, name) => pane.id === "sr" && state.layer !== name ? 0 :
    name === "label" ? Math.min(1, 2.5 * state.overlay) : state.overlay;

  // Where a slice lies in a square of so many pixels: axes across and up, pixels per mm, the voxel in the middle.
  function placed(width, height) {
    const [u, v] = PLANES[state.plane];
    const wide = plan.shape[u] * plan.spacing[u], high = plan.shape[v] * plan.spacing[v];
    const scale = Math.min(width / wide, height / high) * state.zoom;
    const centre = [u, v].map((d) => middle(d) + (state.at[d] - middle(d)) * (1 - 1 / state.zoom));
    return { u, v, scale, centre, mirrored: u === 0 };
  }

  // --- the scan's slices -----------------------------------------------------------------------------------------

  // Numbers of slices along the axis across them, through the crosshair: [place of the border below slice k].
  function borders() {
    const { axis, row, count } = plan.slices;
    const rest = row.reduce((sum, r, d) => sum + (d === axis ? 0 : d === 3 ? r : r * state.at[d]), 0);
    return Array.from({ length: count + 1 }, (_, k) => (k - 0.5 - rest) / row[axis]);
  }

  // The slice of the crosshair as a bar at the edge of the image, the borders of the others as ticks; how thick it is
  // stands beside the switch, as words would lie on tissue or on the name of a pane.
  class Marks {
    constructor(canvas) {
      this.sheet = document.createElement("canvas");
      this.sheet.className = "marks";
      this.sheet.setAttribute("aria-hidden", "true");
      canvas.parentElement.append(this.sheet);
      new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    }

    draw() {
      const { sheet } = this, context = sheet.getContext("2d");
      const box = sheet.parentElement.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
      const width = sheet.width = Math.max(1, Math.round(box.width * ratio));
      const height = sheet.height = Math.max(1, Math.round(box.height * ratio));
      if (!state.marks || !plan.slices) return;
      const { axis, mm } = plan.slices;
      const { u, v, scale, centre, mirrored } = placed(width, height);
      if (axis !== u && axis !== v) return; // along the slices
      context.shadowColor = "#000";
      context.shadowBlur = 3 * ratio;
      const upwards = axis === v;
      const pixel = (at) => upwards ? height / 2 - (at - centre[1]) * plan.spacing[v] * scale :
        width / 2 + (at - centre[0]) * plan.spacing[u] * scale * (mirrored ? -1 : 1);
      const places = borders(), most = upwards ? height : width;
      const line = (from, to, depth, thick, colour) => {
        context.strokeStyle = colour;
        context.lineWidth = thick * ratio;
        context.beginPath();
        if (upwards) { context.moveTo(width - depth * ratio, from); context.lineTo(width - (from === to ? 2 : depth) * ratio, to); }
        else { context.moveTo(from, height - depth * ratio); context.lineTo(to, height - (from === to ? 2 : depth) * ratio); }
        context.stroke();
      };
      const dense = mm * scale < 3 * ratio; // ticks that touch say nothing
      if (!dense) for (const at of places.map(pixel)) if (at >= 0 && at <= most) line(at, at, 8, 1, "rgba(203, 213, 225, 0.8)");
      const own = places.findIndex((at, k) => k < places.length - 1 && (state.at[axis] - at) * (state.at[axis] - places[k + 1]) <= 0);
      if (own < 0) return;
      const ends = [pixel(places[own]), pixel(places[own + 1])];
      line(ends[0], ends[1], 5, 4, MARK);
    }
  }

  // --- a view on a 2-D canvas ------------------------------------------------------------------------------------

  class CanvasView {
    constructor(canvas, pane, volumes) {
      Object.assign(this, { canvas, pane, volumes, context: canvas.getContext("2d") });
      new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
      canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); this.point(event); });
      canvas.addEventListener("pointermove", (event) => { if (event.buttons) this.point(event); });
      canvas.addEventListener("wheel", (event) => {
        if (document.activeElement !== canvas) return;
        event.preventDefault();
        step(PLANES[state.plane][2], Math.sign(event.deltaY));
      }, { passive: false });
    }

    point(event) {
      const { u, v, scale, centre, mirrored } = placed(this.canvas.width, this.canvas.height);
      const box = this.canvas.getBoundingClientRect();
      const ratio = this.canvas.width / box.width;
      let across = ((event.clientX - box.left) * ratio - this.canvas.width / 2) / scale / plan.spacing[u];
      const up = (this.canvas.height / 2 - (event.clientY - box.top) * ratio) / scale / plan.spacing[v];
      if (mirrored) across = -across;
      const at = state.at.slice();
      at[u] = centre[0] + across;
      at[v] = centre[1] + up;
      move(at);
    }

    slice(name, paint) {
      const [u, v, w] = PLANES[state.plane];
      const strides = [1, NX, NX * NY];
      const wide = plan.shape[u], high = plan.shape[v];
      const image = new ImageData(wide, high);
      const data = this.volumes[name];
      for (let j = 0; j < high; j++) {
        let from = Math.round(state.at[w]) * strides[w] + (high - 1 - j) * strides[v];
        for (let i = 0; i < wide; i++, from += strides[u]) paint(image.data, 4 * (j * wide + i), data[from], from, i, high - 1 - j);
      }
      const sheet = document.createElement("canvas");
      sheet.width = wide;
      sheet.height = high;
      sheet.getContext("2d").putImageData(image, 0, 0);
      return sheet;
    }

    image(name, seen) {
      const colour = name in plan.differences ? signed : name === "doubt" ? heat : (value) => [value, value, value];
      return this.slice(name, (out, k, value) => out.set([...colour(value), 255 * seen], k));
    }

    mask(name) {
      const [u, v] = PLANES[state.plane];
      const strides = [1, NX, NX * NY], data = this.volumes[name];
      const inner = (i, j, from) => i > 0 && j > 0 && i < plan.shape[u] - 1 && j < plan.shape[v] - 1 &&
        data[from - strides[u]] && data[from + strides[u]] && data[from - strides[v]] && data[from + strides[v]];
      const fill = name === "label" ? 0 : state.overlay;
      const edge = Math.min(1, 2.5 * state.overlay);
      return this.slice(name, (out, k, value, from, i, j) => {
        if (value) out.set([...(name === "mask" ? plan.colours[value - 1] : COLOURS[name]), 255 * (inner(i, j, from) ? fill : edge)], k);
      });
    }

    draw() {
      const { canvas, context } = this;
      const box = canvas.parentElement.getBoundingClientRect();
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.max(1, Math.round(box.width * ratio));
      canvas.height = Math.max(1, Math.round(box.height * ratio));
      const { u, v, scale, centre, mirrored } = placed(canvas.width, canvas.height);
      const sizes = [plan.shape[u] * plan.spacing[u] * scale, plan.shape[v] * plan.spacing[v] * scale];
      context.save();
      context.translate(canvas.width / 2, canvas.height / 2);
      if (mirrored) context.scale(-1, 1);
      context.translate(-(centre[0] + 0.5) * plan.spacing[u] * scale, -(plan.shape[v] - centre[1] - 0.5) * plan.spacing[v] * scale);
      context.imageSmoothingEnabled = !this.pane.nearest;
      context.drawImage(this.image(this.pane.base, 1), 0, 0, ...sizes);
      context.imageSmoothingEnabled = false;
      for (const name of this.pane.layers) if (opacity(this.pane, name) > 0) {
        const mask = name in COLOURS || name === "mask";
        context.drawImage(mask ? this.mask(name) : this.image(name, opacity(this.pane, name)), 0, 0, ...sizes);
      }
      if (state.cross) {
        const x = (state.at[u] + 0.5) * plan.spacing[u] * scale, y = (plan.shape[v] - state.at[v] - 0.5) * plan.spacing[v] * scale;
        context.strokeStyle = "rgba(250, 204, 21, 0.6)";
        context.lineWidth = ratio;
        context.beginPath();
        context.moveTo(x, 0); context.lineTo(x, sizes[1]);
        context.moveTo(0, y); context.lineTo(sizes[0], y);
        context.stroke();
      }
      context.restore();
      this.letters(ratio, u, mirrored);
    }

    letters(ratio, u, mirrored) {
      const ends = mirrored ? [ENDS[u][1], ENDS[u][0]] : [...ENDS[u]];
      const { canvas, context } = this;
      context.fillStyle = "#cbd5e1";
      context.font = `${12 * ratio}px system-ui, sans-serif`;
      context.fillText(ends[0], 8 * ratio, canvas.height / 2);
      context.fillText(ends[1], canvas.width - 18 * ratio, canvas.height / 2);
    }
  }

  // --- a view by NiiVue --------------------------------------------------------------------------------------------

  class NiivueView {
    static async make(canvas, pane, volumes) {
      const view = new NiivueView();
      const nv = new niivue.Niivue({
        backColor: [0, 0, 0, 1], crosshairColor: [0.98, 0.8, 0.08, 0.6], crosshairWidth: THIN,
        isRadiologicalConvention: true, dragAndDropEnabled: false, logLevel: "error", loadingText: "", isColorbar: false,
        isNearestInterpolation: pane.nearest, scrollRequiresFocus: true, viewModeHotKey: "", clipPlaneHotKey: "",
        cycleClipPlaneHotKey: "", dragMode: niivue.DRAG_MODE.none, isAntiAlias: false, fontMinPx: 11,
        // By default it would draw all planes and a rendering at each volume that is added.
        sliceType: niivue.SLICE_TYPE[state.plane.toUpperCase()],
      });
      Object.assign(view, { canvas, pane, nv });
      for (const [name, rgb] of Object.entries(COLOURS)) {
        nv.addColormap(name, { R: [0, rgb[0]], G: [0, rgb[1]], B: [0, rgb[2]], A: [0, 255], I: [0, 255] });
      }
      // An overlay's alpha is on or off in NiiVue: differences and doubt lie over the SR in the colours of their scales.
      const colours = (stops, I) => ({ R: stops.map((c) => c[0]), G: stops.map((c) => c[1]), B: stops.map((c) => c[2]), A: I.map(() => 255), I });
      nv.addColormap("signed", colours([DARKER, [0, 0, 0], [0, 0, 0], BRIGHTER], [0, 127, 129, 255]));
      nv.addColormap("doubt", colours(DOUBT, [0, 128, 255]));
      nv.addColormap("opaque", colours([[0, 0, 0], [255, 255, 255]], [0, 255]));
      if (plan.colours) { // between two values colours run into each other: each takes up three of the 256
        const own = Array.from({ length: 256 }, (_, v) => Math.min(Math.round(v / 3), plan.colours.length));
        const map = colours(own.map((k) => plan.colours[Math.max(k - 1, 0)]), own.map((_, v) => v));
        nv.addColormap("mask", { ...map, A: own.map((k) => k && 255) });
      }
      await nv.attachToCanvas(canvas);
      const layers = [pane.base, ...pane.layers].map((name, i) => [name, i ? opacity(pane, name) : 1]);
      for (const [i, [name, seen]] of layers.entries()) {
        const map = name in plan.differences ? "signed" : name in COLOURS || name === "doubt" || name === "mask" ? name : i ? "opaque" : "gray";
        const data = name === "mask" ? volumes.mask.map((v) => 3 * v) : volumes[name];
        nv.addVolume(await niivue.NVImage.new(nifti(data), name + ".nii", map, seen, null, 0, name in COLOURS ? 1 : 255));
      }
      Object.assign(view, { volumes, outlined: pane.layers.indexOf("label") + 1 });
      nv.onLocationChange = (place) => {
        if (!view.drawing) move(place.mm.slice(0, 3).map((mm, d) => mm / plan.spacing[d] + middle(d)), view);
      };
      return view;
    }

    draw() {
      const { nv } = this;
      this.drawing = true;
      nv.opts.crosshairWidth = state.cross ? THIN : 0;
      nv.scene.crosshairPos = nv.mm2frac(state.at.map((v, d) => (v - middle(d)) * plan.spacing[d]));
      const shift = state.at.map((v, d) => -(v - middle(d)) * plan.spacing[d] * (state.zoom - 1));
      nv.scene.pan2Dxyzmm = [...shift, state.zoom];
      this.pane.layers.forEach((name, i) => {
        const seen = opacity(this.pane, name);
        if (nv.volumes[i + 1].opacity !== seen) nv.setOpacity(i + 1, seen);
      });
      if (this.outlined && this.plane !== state.plane) {
        // The truth is an outline, so that the segmentation under it stays visible.
        nv.volumes[this.outlined].img = rim(this.volumes.label);
        nv.updateGLVolume();
      }
      this.plane = state.plane;
      const type = { axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal, sagittal: nv.sliceTypeSagittal }[state.plane];
      if (nv.opts.sliceType !== type) nv.setSliceType(type);
      nv.drawScene();
      this.drawing = false;
    }
  }

  // --- what the controls do ----------------------------------------------------------------------------------------

  let views = [], marks = [];
  let waiting = false;

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  function draw() {
    views.forEach((view) => view.draw());
    marks.forEach((sheet) => sheet.draw());
    tell();
  }

  function move(at, from) {
    const next = at.map((v, d) => clamp(Math.round(v), 0, plan.shape[d] - 1));
    if (next.every((v, d) => v === state.at[d]) && from) return;
    state.at = next;
    redraw();
  }

  function step(axis, by) {
    const at = state.at.slice();
    at[axis] += by;
    move(at);
  }

  function tell() {
    const through = PLANES[state.plane][2];
    const world = [0, 1, 2].map((r) => state.at.reduce((sum, v, d) => sum + plan.affine[r][d] * v, plan.affine[r][3]));
    $("slice").max = plan.shape[through] - 1;
    $("slice").value = state.at[through];
    $("slice").setAttribute("aria-valuetext", `${state.plane} slice ${state.at[through] + 1} of ${plan.shape[through]}`);
    $("place").textContent = "R " + world[0].toFixed(1) + "  A " + world[1].toFixed(1) + "  S " + world[2].toFixed(1) + " mm";
  }

  function wipe(share) {
    if (!$("wipe")) return;
    state.wipe = clamp(share, 0, 1);
    const stage = $("stage"), over = stage.querySelector(".over");
    const on = stage.classList.contains("wipe");
    over.querySelector(".holder").style.clipPath = on ? `inset(0 0 0 ${100 * state.wipe}%)` : "none";
    $("divider").style.left = 100 * state.wipe + "%";
    $("wipe").value = Math.round(100 * state.wipe);
    $("wipe").disabled = !on;
  }

  function keys(event) {
    const [u, v, w] = PLANES[state.plane];
    const right = u === 0 ? -1 : 1; // the patient's right is on the left
    const steps = { ArrowLeft: [u, -right], ArrowRight: [u, right], ArrowUp: [v, 1], ArrowDown: [v, -1], PageUp: [w, 1], PageDown: [w, -1] };
    if (steps[event.key]) step(...steps[event.key]);
    else if (event.key === "+" || event.key === "-") zoom(state.zoom * (event.key === "+" ? 1.25 : 0.8));
    else return;
    event.preventDefault();
  }

  function zoom(value) {
    state.zoom = clamp(value, 1, 8);
    $("zoom").value = state.zoom;
    redraw();
  }

  function bind() {
    for (const input of document.getElementsByName("plane")) input.addEventListener("change", () => { state.plane = input.value; redraw(); });
    for (const input of document.getElementsByName("layout")) input.addEventListener("change", () => {
      $("stage").classList.toggle("wipe", input.value === "wipe");
      $("panes").classList.toggle("side", input.value === "side");
      wipe(state.wipe);
      redraw();
    });
    $("slice").addEventListener("input", () => { const at = state.at.slice(); at[PLANES[state.plane][2]] = Number($("slice").value); move(at); });
    $("zoom").addEventListener("input", () => zoom(Number($("zoom").value)));
    if ($("wipe")) $("wipe").addEventListener("input", () => wipe(Number($("wipe").value) / 100));
    if ($("overlay")) $("overlay").addEventListener("input", () => { state.overlay = Number($("overlay").value) / 100; redraw(); });
    for (const input of document.getElementsByName("layer")) input.addEventListener("change", () => { state.layer = input.value; redraw(); });
    $("start").addEventListener("click", () => move(plan.start));
    if ($("marks")) $("marks").addEventListener("change", () => { state.marks = $("marks").checked; redraw(); });
    $("cross").addEventListener("change", () => { state.cross = $("cross").checked; redraw(); });
    const slide = (event) => {
      const box = $("stage").getBoundingClientRect();
      wipe((event.clientX - box.left) / box.width);
    };
    $("divider").addEventListener("pointerdown", (event) => { $("divider").setPointerCapture(event.pointerId); slide(event); });
    $("divider").addEventListener("pointermove", (event) => { if (event.buttons) slide(event); });
    // NiiVue has keys of its own, which would set its views apart from the others.
    for (const kind of ["keydown", "keyup"]) holder.addEventListener(kind, (event) => {
      if (event.target.tagName !== "CANVAS") return;
      event.stopPropagation();
      if (kind === "keydown") keys(event);
    }, true);
  }

  function fresh(old) {
    const canvas = old.cloneNode(false);
    old.replaceWith(canvas);
    return canvas;
  }

  // The name of what draws; browsers that hide it say it is a graphics card's.
  function drawnBy(gl) {
    const names = gl.getExtension("WEBGL_debug_renderer_info");
    return String(gl.getParameter(names ? names.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
  }

  async function start() {
    const volumes = await readVolumes();
    const canvases = () => plan.panes.map((pane) => $("canvas-" + pane.id));
    let by = "canvas";
    const gl = document.createElement("canvas").getContext("webgl2"), able = typeof niivue === "object" && gl !== null;
    // In software NiiVue takes many times as long (docs/report.md has it measured), and the canvases show the same.
    const slow = able && SOFTWARE.test(drawnBy(gl));
    if (gl) gl.getExtension("WEBGL_lose_context")?.loseContext(); // browsers allow few at a time
    if (able && location.hash !== "#canvas" && (!slow || location.hash === "#niivue")) {
      try {
        for (const [i, canvas] of canvases().entries()) views.push(await NiivueView.make(canvas, plan.panes[i], volumes));
        views.forEach((view) => view.draw());
        by = "niivue";
      } catch (error) {
        console.warn("NiiVue cannot draw here, plain canvases take its place: " + error);
      }
    }
    if (by === "canvas") views = canvases().map((canvas, i) => new CanvasView(fresh(canvas), plan.panes[i], volumes));
    marks = canvases().map((canvas) => new Marks(canvas));
    bind();
    wipe(state.wipe);
    draw();
    $("renderer").textContent = by === "niivue" ? "Drawn by NiiVue." :
      slow ? "Drawn without WebGL 2, which this browser does in software, slowly (#niivue behind the page's address uses it)." :
      "Drawn without WebGL 2.";
    holder.dataset.viewer = by;
  }

  start().catch((error) => {
    holder.dataset.viewer = "failed";
    $("renderer").textContent = "This browser cannot show the volumes (" + error.message + "); the picture below shows them.";
  });
})();
