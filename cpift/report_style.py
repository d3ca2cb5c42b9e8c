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
.warning { background: var(--warn); border-left: 4px solid var(--s4); padding: .5rem 1rem; margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-size: .88rem; padding-bottom: .35rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--muted); vertical-align: bottom; }
th[scope="row"], .left { text-align: left; }
.scores th[scope="row"] { position: sticky; left: 0; background: var(--paper); white-space: nowrap; }
.scores td small { display: block; white-space: nowrap; }
td.own { outline: 1px dashed var(--muted); outline-offset: -3px; }
tr.final td, .scores tr.final th { background: var(--soft); }
.best { font-weight: 700; }
.up { color: var(--good); } .down { color: var(--bad); }
.heat td { text-align: center; min-width: 4.2rem; }
.heat td small { color: inherit; }
.diagonal { color: var(--muted); }
.edge { outline: 2px solid var(--s1); outline-offset: -3px; }
figure { margin: .8rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: .4rem 2rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .88rem; }
.narrow { max-width: 36rem; }
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
@media (max-width: 40rem) { body { padding: 1.2rem .8rem 3rem; } th, td { padding: .3rem .45rem; } }
@media print { body { max-width: none; } details > * { display: block; } nav { display: none; } }
"""
