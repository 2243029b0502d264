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
  const state = { at: plan.start.slice(), plane: "axial", zoom: 1, overlay: 0.35, wipe: 0.5, cross: true };
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
    if (volumes.truth) {
      const error = new Uint8Array(NX * NY * NZ);
      for (let i = 0; i < error.length; i++) error[i] = Math.min(255, plan.error_gain * Math.abs(volumes.sr[i] - volumes.truth[i]));
      volumes.error = error;
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
  const hot = (v) => [clamp(v * 3, 0, 255), clamp(v * 3 - 255, 0, 255), clamp(v * 3 - 510, 0, 255)];

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

    place() {
      const [u, v] = PLANES[state.plane];
      const wide = plan.shape[u] * plan.spacing[u], high = plan.shape[v] * plan.spacing[v];
      const scale = Math.min(this.canvas.width / wide, this.canvas.height / high) * state.zoom;
      const centre = [u, v].map((d) => middle(d) + (state.at[d] - middle(d)) * (1 - 1 / state.zoom));
      return { u, v, scale, centre, mirrored: u === 0 };
    }

    point(event) {
      const { u, v, scale, centre, mirrored } = this.place();
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

    grey() {
      const coloured = this.pane.colours === "hot";
      return this.slice(this.pane.base, (out, k, value) => {
        const rgb = coloured ? hot(value) : [value, value, value];
        out.set([rgb[0], rgb[1], rgb[2], 255], k);
      });
    }

    mask(name) {
      const [u, v] = PLANES[state.plane];
      const strides = [1, NX, NX * NY], data = this.volumes[name];
      const inner = (i, j, from) => i > 0 && j > 0 && i < plan.shape[u] - 1 && j < plan.shape[v] - 1 &&
        data[from - strides[u]] && data[from + strides[u]] && data[from - strides[v]] && data[from + strides[v]];
      const fill = name === "label" ? 0 : state.overlay;
      return this.slice(name, (out, k, value, from, i, j) => {
        if (value) out.set([...COLOURS[name], 255 * (inner(i, j, from) ? fill : Math.min(1, 2.5 * state.overlay))], k);
      });
    }

    draw() {
      const { canvas, context } = this;
      const box = canvas.parentElement.getBoundingClientRect();
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.max(1, Math.round(box.width * ratio));
      canvas.height = Math.max(1, Math.round(box.height * ratio));
      const { u, v, scale, centre, mirrored } = this.place();
      const sizes = [plan.shape[u] * plan.spacing[u] * scale, plan.shape[v] * plan.spacing[v] * scale];
      context.save();
      context.translate(canvas.width / 2, canvas.height / 2);
      if (mirrored) context.scale(-1, 1);
      context.translate(-(centre[0] + 0.5) * plan.spacing[u] * scale, -(plan.shape[v] - centre[1] - 0.5) * plan.spacing[v] * scale);
      context.imageSmoothingEnabled = !this.pane.nearest;
      context.drawImage(this.grey(), 0, 0, ...sizes);
      context.imageSmoothingEnabled = false;
      if (state.overlay > 0) for (const name of this.pane.masks) context.drawImage(this.mask(name), 0, 0, ...sizes);
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
      });
      Object.assign(view, { canvas, pane, nv });
      for (const [name, rgb] of Object.entries(COLOURS)) {
        nv.addColormap(name, { R: [0, rgb[0]], G: [0, rgb[1]], B: [0, rgb[2]], A: [0, 255], I: [0, 255] });
      }
      await nv.attachToCanvas(canvas);
      const layers = [[pane.base, pane.colours, 255, 1], ...pane.masks.map((name) => [name, name, 1, state.overlay])];
      for (const [name, colours, most, opacity] of layers) {
        nv.addVolume(await niivue.NVImage.new(nifti(volumes[name]), name + ".nii", colours, opacity, null, 0, most));
      }
      Object.assign(view, { volumes, outlined: pane.masks.indexOf("label") + 1 });
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
      this.pane.masks.forEach((name, i) => {
        const opacity = i + 1 === this.outlined ? Math.min(1, 2.5 * state.overlay) : state.overlay;
        if (nv.volumes[i + 1].opacity !== opacity) nv.setOpacity(i + 1, opacity);
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

  let views = [];
  let waiting = false;

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      views.forEach((view) => view.draw());
      tell();
    });
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

  async function start() {
    const volumes = await readVolumes();
    const canvases = () => plan.panes.map((pane) => $("canvas-" + pane.id));
    let by = "canvas";
    const able = typeof niivue === "object" && document.createElement("canvas").getContext("webgl2") !== null;
    if (able && location.hash !== "#canvas") {
      try {
        for (const [i, canvas] of canvases().entries()) views.push(await NiivueView.make(canvas, plan.panes[i], volumes));
        views.forEach((view) => view.draw());
        by = "niivue";
      } catch (error) {
        console.warn("NiiVue cannot draw here, plain canvases take its place: " + error);
      }
    }
    if (by === "canvas") views = canvases().map((canvas, i) => new CanvasView(fresh(canvas), plan.panes[i], volumes));
    bind();
    wipe(state.wipe);
    views.forEach((view) => view.draw());
    tell();
    $("renderer").textContent = by === "niivue" ? "Drawn by NiiVue." : "Drawn without WebGL 2.";
    holder.dataset.viewer = by;
  }

  start().catch((error) => {
    holder.dataset.viewer = "failed";
    $("renderer").textContent = "This browser cannot show the volumes (" + error.message + "); the picture below shows them.";
  });
})();
