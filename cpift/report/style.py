"""The style sheet of the report: light or dark as the reader's system asks, no web fonts."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2430; --muted: #5b6575; --grid: #d9dee6; --soft: #f4f6f9;
  --good: #00618f; --bad: #a34700; --warn: #fdf3d8; --heat: 0, 114, 178;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #b07d00;
  --s5: #3a9bd1; --s6: #7a5195; --s7: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181f; --ink: #e4e8ee; --muted: #a3adbb; --grid: #343c48; --soft: #1c222b;
    --good: #6cc0ef; --bad: #f5a35f; --warn: #3a3118; --heat: 86, 180, 233;
    --s0: #56b4e9; --s1: #f0884a; --s2: #2fc79a; --s3: #e3a2c6; --s4: #e6b740;
    --s5: #9ad4f5; --s6: #bda0d6; --s7: #a3adbb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .7rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, ul { margin: .4rem 0 .8rem; max-width: 46rem; }
ul { padding-left: 1.2rem; }
.muted, caption, figcaption, small { color: var(--muted); }
nav { font-size: .9rem; margin: .6rem 0 1.2rem; }
nav a { margin-right: .9rem; white-space: nowrap; }
a { color: var(--good); }
.verdict { background: var(--soft); border-left: 4px solid var(--s0); padding: .7rem 1rem; margin: 1rem 0; }
.verdict p { margin: .25rem 0; max-width: none; }
.headline { font-size: 1.12rem; font-weight: 600; }
.verdict pre { background: var(--paper); }
.warning { background: var(--warn); border-left: 4px solid var(--s4); padding: .5rem 1rem; margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-size: .88rem; padding-bottom: .35rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--muted); vertical-align: bottom; }
th[scope="row"], .left { text-align: left; }
.scores th[scope="row"], .tokens th[scope="row"] { min-width: 9.5rem; max-width: 18rem; overflow-wrap: break-word; }
.scores th[scope="row"] { position: sticky; left: 0; background: var(--paper); }
.scores td small { display: block; white-space: nowrap; }
td.own { outline: 1px dashed var(--muted); outline-offset: -3px; }
tr.final td, .scores tr.final th { background: var(--soft); }
.best { font-weight: 700; }
.up { color: var(--good); } .down { color: var(--bad); }
.heat { min-width: min(28rem, 100%); }
.heat td { text-align: center; min-width: 4.2rem; }
.heat td small { color: inherit; }
.diagonal { color: var(--muted); }
.edge { outline: 2px solid var(--s1); outline-offset: -3px; }
figure { margin: .8rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: .4rem 2rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .88rem; }
.behind { font-size: .85rem; margin: .2rem 0; }
.behind .scroll { max-height: 22rem; overflow-y: auto; }
.keys { font-size: .88rem; } .key { margin-right: 1.1rem; display: inline-block; }
.absent { border: 1px dashed var(--grid); padding: .4rem .8rem; align-self: start; font-size: .9rem; }
.tokens .bars { min-width: 8rem; width: 30%; vertical-align: middle; }
.bar { display: block; height: .7rem; background: var(--s0); }
.tokens .parts { color: var(--muted); }
.sample { margin: 1rem 0 1.4rem; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
.replies { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 46%), 1fr)); gap: .5rem; }
.replies > div { border: 1px solid var(--grid); padding: .3rem .6rem; min-width: 0; }
.replies p { margin: 0; font-size: .88rem; overflow-wrap: anywhere; }
.replies pre { padding: .3rem .5rem; }
.replies .last { border: 2px solid var(--s1); } .replies .expected { border-style: dashed; }
tr.kind th { text-align: left; color: var(--muted); font-weight: 400; font-style: italic; }
.narrow { max-width: 34rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .6rem 1.2rem; }
pre {
  background: var(--soft); padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; margin: .5rem 0;
}
code { font-size: .88em; overflow-wrap: anywhere; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--good); }
.checks th, .provenance th { text-align: left; }
.pass, .fail { white-space: nowrap; }
.pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 700; }
@media (max-width: 40rem) {
  body { padding: 1.2rem .8rem 3rem; } th, td { padding: .3rem .45rem; }
  .scores th[scope="row"], .tokens th[scope="row"] { min-width: 0; }
  .tokens .bars { display: none; } .tokens th:nth-child(3) { display: none; }
  .verdict pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@page { size: A4; margin: 14mm; }
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --ink: #1d2430; --muted: #5b6575; --grid: #d9dee6; --soft: #f4f6f9;
    --good: #00618f; --bad: #a34700; --warn: #fdf3d8; --heat: 0, 114, 178;
    --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #b07d00;
    --s5: #3a9bd1; --s6: #7a5195; --s7: #6b7280;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, summary, .behind { display: none; }
  details::details-content { content-visibility: visible; height: auto; opacity: 1; }
  details > * { display: block; }
  details > summary { display: none; }
  .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  table { font-size: 8pt; max-width: 100%; }
  th, td { padding: 1.2mm 1.4mm; }
  th, td, td small, th[scope="row"], .left { white-space: normal !important; overflow-wrap: anywhere; }
  td, td small, .wide th, .widest th { overflow-wrap: break-word; }
  .tokens th { overflow-wrap: normal; }
  .wide { font-size: 6.4pt; } .wide th, .wide td { padding: .9mm .7mm; }
  .widest { font-size: 5pt; } .widest th, .widest td { padding: .7mm .4mm; overflow-wrap: anywhere; }
  .scores th[scope="row"], .tokens th[scope="row"] { position: static; min-width: 0; }
  .narrow { max-width: 115mm; }
  .heat td { min-width: 0; }
  .panels { grid-template-columns: repeat(2, 1fr); } .pair { grid-template-columns: 1fr; }
  .pair svg { max-width: 125mm; }
  .replies { grid-template-columns: repeat(3, 1fr); }
  tr, figure, .sample, .replies > div, .verdict, .warning, .absent { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""
