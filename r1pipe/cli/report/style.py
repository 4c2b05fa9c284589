"""The report's style sheet; it travels inside the page."""

STYLE = """
:root {
  --page: #ffffff; --raised: #f7f8f9; --ink: #1c2024; --muted: #6b7280; --line: #e2e4e8;
  --s1: #2a6bb0; --s2: #d0752a; --s3: #2f8f6b; --s4: #b04a6f; --s5: #7a67b8; --s6: #a48a1e;
  --s7: #8a8f98; --s8: #c3c7cd;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --raised: #1b1f23; --ink: #e4e7ea; --muted: #99a1ab; --line: #2d3339;
  --s1: #6aa9e9; --s2: #e59a58; --s3: #5fbf98; --s4: #dd86a6; --s5: #a898e2; --s6: #cdb44e;
  --s7: #9aa0a9; --s8: #5f666e;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1080px; padding: 3rem 1.5rem 5rem;
  background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
h3 { font-size: .9rem; margin: 0 0 .5rem; }
section { margin-top: 3rem; }
.lead { max-width: 46rem; margin: 0; }
.note { color: var(--muted); max-width: 52rem; margin: 0 0 1rem; font-size: .9rem; }
.ci { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }

.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.6rem 0 0; padding: 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dt { color: var(--muted); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td {
  text-align: right; padding: .38rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top;
}
th:first-child, table.left th, table.left td, table.last-left :is(th, td):last-child { text-align: left; }
th:first-child { padding-left: 0; }
table.last-left :is(th, td):last-child { white-space: normal; width: 55%; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 600; }
tr.control th, tr.control td { color: var(--muted); font-weight: 400; }
tr.divide th { padding-top: 1.4rem; color: var(--muted); font-weight: 500; }
tr.total th, tr.total td { font-weight: 600; }

code, pre {
  font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace;
  font-size: .82em;
}
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }

figure { margin: 0 0 1.4rem; }
figcaption { font-weight: 600; font-size: .9rem; }
figure svg { width: 100%; height: auto; display: block; }
figure text { font-family: inherit !important; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 2rem; }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 1rem; font-size: .84rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem; }
.p1 { background: var(--s1); } .p2 { background: var(--s2); } .p3 { background: var(--s3); }
.p4 { background: var(--s4); } .p5 { background: var(--s5); } .p6 { background: var(--s6); }
.p7 { background: var(--s7); } .p8 { background: var(--s8); }
.bar {
  display: flex; height: 9px; min-width: 9rem; margin: .35em 0; border-radius: 2px;
  background: var(--raised); overflow: hidden;
}
.bar i { display: block; height: 100%; }

details { border-top: 1px solid var(--line); padding: .6rem 0; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .4rem; }
summary em { color: var(--muted); font-weight: 400; font-style: normal; margin-right: .4rem; }
summary .ci { display: inline; margin-left: .6rem; }
.samples {
  display: grid; grid-auto-flow: column; grid-auto-columns: minmax(220px, 1fr); gap: .8rem;
  overflow-x: auto; padding-bottom: .6rem;
}
article { background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
article.control { border-style: dashed; background: none; }
.thought { color: var(--muted); }
.badge {
  float: right; font-size: .72rem; font-weight: 500; border-radius: 3px; padding: 0 .4rem; border: 1px solid;
}
.right { color: var(--s3); }
.wrong { color: var(--s4); }
.cut { color: var(--s2); }

.step {
  display: grid; grid-template-columns: 12rem 1fr 6rem 7rem; gap: 1rem; align-items: center;
  padding: .2rem 0; font-size: .86rem; font-variant-numeric: tabular-nums;
}
.step span:nth-child(n+3) { text-align: right; color: var(--muted); }
.step + details { border: 0; padding: 0 0 .4rem 1rem; font-size: .86rem; }
.step + details summary { font-weight: 400; color: var(--muted); }
.step + details pre { background: var(--raised); padding: .5rem .7rem; margin: .3rem 0; border-radius: 4px; }
"""
