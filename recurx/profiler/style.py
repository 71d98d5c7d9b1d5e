"""The look of the HTML report: system fonts, light and dark, narrow tables on a phone."""

STYLE = """
:root { color-scheme: light dark; --bg: #fcfcfb; --ink: #1c1c1a; --dim: #62625d; --line: #dcdcd6;
  --card: #f3f3ef; --product: #2a78d6; --attention: #159a6b; --glue: #e0622c; --fused: #0f8fa8;
  --around: #8d8d86; --training: #5a49bd; --other: #c3a51a; }
@media (prefers-color-scheme: dark) { :root { --bg: #171716; --ink: #ecece8; --dim: #a3a39c;
  --line: #3a3a37; --card: #232321; --product: #4a94ea; --attention: #2bb584; --glue: #e8763f;
  --fused: #35b3cc; --around: #85857e; --training: #9486ee; --other: #cfb33a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1rem 3rem; background: var(--bg);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.08rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 46rem; } .dim, footer { color: var(--dim); font-size: .88rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .82rem; }
.scroll { overflow-x: auto; } svg { display: block; width: 100%; height: auto; }
.scroll svg.strip { min-width: 900px; }
.scroll svg.roofline { min-width: 34rem; } figure { margin: 0; } figcaption { color: var(--dim); }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem;
  overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; } tr.group td { font-weight: 600; padding-top: .8rem; }
.bar { min-width: 5rem; } .bar i { display: block; height: .75rem; border-radius: 2px;
  min-width: 1px; }
pre { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .4rem 0; }
.keys i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .35rem; vertical-align: -1px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg text.axis { fill: var(--dim); }
.grid { stroke: var(--line); stroke-width: 1; } .roof { stroke: var(--ink); stroke-width: 2;
  fill: none; } .roof.low { stroke-dasharray: 5 4; stroke-width: 1.2; }
circle { fill-opacity: .72; stroke: var(--bg); stroke-width: 1; }
rect { stroke: var(--bg); stroke-width: .6; } rect.frame { fill: var(--card); }
@media (max-width: 44rem) { .wide { display: none; } body { font-size: 14px; padding: .7rem; }
  th, td { padding: .2rem .3rem; } th:first-child, td:first-child { min-width: 6rem; }
  .bar { min-width: 2.5rem; } }
"""
