// Draws the page's figures when they come into view, in the colours of the page.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hover = matchMedia("(hover: hover)");
  const touch = matchMedia("(pointer: coarse)");
  const drawn = new Map(); // by id: the element
  let printing = false;

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const onPaper = { "--ink": "#000", "--soft": "#444", "--rule": "#bbb", "--paper": "#fff" };
    const colour = (name) => (printing ? onPaper[name] : style.getPropertyValue(name).trim());
    const axis = { gridcolor: colour("--rule"), zerolinecolor: colour("--rule"), linecolor: colour("--rule") };
    return { ink: colour("--ink"), soft: colour("--soft"), paper: colour("--paper"), axis };
  }

  // The page's layout on paper is not known before it is printed: so sizes are given, for two figures a line
  const ON_PAPER = { wide: { width: 690, height: 270 }, half: { width: 335, height: 250 } };

  // Buttons by name: one of plotly's own sends the figure to a service. Few, since each is a stop of the Tab key
  const CONFIG = { displaylogo: false, plotlyServerURL: "", modeBarButtons: [["toImage", "resetScale2d"]] };

  function layout(own, element) {
    const { ink, soft, paper, axis } = theme();
    const narrow = innerWidth < 760 && !printing;
    return {
      font: { family: "system-ui, sans-serif", size: printing ? 10 : 12, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow ? 48 : 58, r: 12, t: 26, b: 40 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
      hovermode: "closest", hoverlabel: { bgcolor: paper, font: { color: ink } },
      dragmode: touch.matches ? false : "zoom",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow || printing ? 10 : 12 } },
      ...(printing ? ON_PAPER[element.closest("figure").classList.contains("wide") ? "wide" : "half"] : {}),
      ...own,
      xaxis: { automargin: true, ...axis, ...own.xaxis },
      yaxis: { automargin: true, ...axis, exponentformat: "power", ...own.yaxis },
    };
  }

  function draw(element) {
    const figure = figures[element.dataset.figure];
    const select = element.parentElement.querySelector("select");
    const traces = select ? figure.choices[select.selectedIndex][1] : figure.traces;
    drawn.set(element.dataset.figure, element);
    // plotly.js writes into what it is given
    const [data, lay] = JSON.parse(JSON.stringify([traces, layout(figure.layout, element)]));
    return Plotly.react(element, data, lay, {
      ...CONFIG, responsive: !printing, displayModeBar: hover.matches ? "hover" : false, toImageButtonOptions: { filename: element.dataset.figure, scale: 2 },
    }).then(() => { for (const svg of element.querySelectorAll(".main-svg")) svg.setAttribute("aria-hidden", "true"); }); // the numbers are told below
  }

  const elements = [...document.querySelectorAll(".plot[data-figure]")];
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { watch.unobserve(entry.target); draw(entry.target); }
    }
  }, { rootMargin: "400px" });
  for (const element of elements) {
    watch.observe(element);
    const select = element.parentElement.querySelector("select");
    if (select) {
      select.selectedIndex = select.options.length - 1;
      select.addEventListener("change", () => draw(element));
    }
  }
  const redraw = () => { for (const element of drawn.values()) draw(element); };
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    printing = true;
    for (const element of elements) { watch.unobserve(element); draw(element); }
  });
  addEventListener("afterprint", () => { printing = false; redraw(); });
  matchMedia("print").addEventListener("change", (event) => { printing = event.matches; redraw(); });
})();
