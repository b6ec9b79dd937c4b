"""The report's look: one stylesheet, light and dark, nothing fetched. Data only."""

CSS = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#fff; --ink:#1b1f27; --soft:#5d6675; --rule:#e3e6eb;
  --c1:#2f6fdd; --c2:#d9822b; --c3:#2a9d6f; --mark:#dff0e4; --mark-ink:#12492d; --good:#1f8a55; --warn:#b87503;
  --bad:#c73a3a; --code:#f1f3f6; }
@media (prefers-color-scheme: dark) { :root { --page:#12151a; --card:#1a1e25; --ink:#e6e9ee; --soft:#98a2b3;
  --rule:#2c323c; --c1:#6ea3ff; --c2:#f0a95c; --c3:#5fcb9b; --mark:#173a29; --mark-ink:#a9ebc6; --good:#4cc38a;
  --warn:#f0b341; --bad:#ff7b72; --code:#222731; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
  "DejaVu Sans",sans-serif; }
main { max-width:1080px; margin:0 auto; padding:32px 20px 64px; }
header { display:flex; gap:16px; align-items:flex-start; flex-wrap:wrap; margin-bottom:20px; }
header div { flex:1 1 420px; }
h1 { font-size:26px; line-height:1.2; margin:0 0 4px; overflow-wrap:anywhere; }
h2 { font-size:17px; margin:0 0 12px; }
h3 { font-size:13px; margin:0 0 6px; color:var(--soft); font-weight:600; }
p { margin:0 0 10px; } .soft, .none { color:var(--soft); }
section { background:var(--card); border:1px solid var(--rule); border-radius:12px; padding:20px; margin-bottom:16px; }
.badge { border-radius:999px; padding:6px 18px; font-weight:700; font-size:15px; color:#fff; letter-spacing:.02em; }
.badge.pass { background:#1f8a55; } .badge.warn { background:#b87503; } .badge.block { background:#c73a3a; }
.badge.none { background:var(--soft); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(158px,1fr)); gap:12px; margin-bottom:16px; }
.tile { background:var(--card); border:1px solid var(--rule); border-radius:12px; padding:14px 16px; }
.tile b { display:block; font-size:20px; white-space:nowrap; line-height:1.25; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:13px; }
.reasons { margin:0; padding:0; list-style:none; }
.reasons li { padding:8px 12px; border-left:4px solid var(--rule); margin-bottom:6px; background:var(--code);
  border-radius:0 8px 8px 0; overflow-wrap:anywhere; }
.reasons li.block { border-color:var(--bad); } .reasons li.warn { border-color:var(--warn); }
.wide { overflow-x:auto; } .wide > svg { min-width:560px; }
table { border-collapse:collapse; width:100%; font-size:14px; }
th { text-align:left; color:var(--soft); font-weight:600; font-size:13px; }
th, td { padding:7px 12px 7px 0; border-bottom:1px solid var(--rule); vertical-align:top; }
tr:last-child td { border-bottom:0; } td.number, th.number { text-align:right; font-variant-numeric:tabular-nums; }
td.ok { color:var(--good); font-weight:600; } td.warn { color:var(--warn); font-weight:600; }
td.skipped { color:var(--soft); }
td.block { color:var(--bad); font-weight:600; } td.key { color:var(--soft); width:220px; }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(300px,1fr)); gap:20px; }
svg { width:100%; height:auto; display:block; } .grid { stroke:var(--rule); }
.tick { fill:var(--soft); font-size:11px; }
.level { stroke:var(--soft); stroke-dasharray:5 4; } .line { fill:none; stroke-width:2; stroke-linejoin:round; }
.line.c1 { stroke:var(--c1); } .line.c2 { stroke:var(--c2); } .line.c3 { stroke:var(--c3); }
.line.thin { stroke-width:1; opacity:.45; } .dot.c1 { fill:var(--c1); } .dot.c2 { fill:var(--c2); }
.dot.c3 { fill:var(--c3); }
.legend { display:flex; gap:18px; flex-wrap:wrap; font-size:13px; color:var(--soft); margin:0 0 6px; }
.legend i { display:inline-block; width:14px; height:3px; border-radius:2px; margin-right:6px; vertical-align:middle; }
.bar { background:var(--code); border-radius:4px; height:8px; min-width:90px; }
.bar i { display:block; height:8px; border-radius:4px; background:var(--c1); }
.sample { border-top:1px solid var(--rule); padding-top:14px; margin-top:14px; }
.sample:first-of-type { border:0; padding:0; margin:0; }
pre { white-space:pre-wrap; overflow-wrap:anywhere; margin:0; font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,
  "DejaVu Sans Mono",monospace; background:var(--code); border-radius:8px; padding:10px 12px; }
.answers { display:grid; grid-template-columns:repeat(auto-fit,minmax(230px,1fr)); gap:12px; margin-top:8px; }
.text { margin-bottom:10px; } .text span { color:var(--soft); }
mark { background:var(--mark); color:var(--mark-ink); border-radius:3px; padding:1px 0; }
code { font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace; font-size:13px;
  overflow-wrap:anywhere; }
@media print { body { background:#fff; } section, .tile { break-inside:avoid; } }
"""
