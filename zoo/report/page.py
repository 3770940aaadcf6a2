"""The page around a report: its style, for light and dark, wide and narrow. No script, and nothing from elsewhere."""

from __future__ import annotations

# Eight colours an architecture may have, found by a search for what is farthest apart for every kind of colour vision
# at 3.6:1 or more against the ground. tests/test_report_page.py measures both.
LIGHT = ("#0020c2", "#743211", "#009959", "#f20dcc", "#4c1f7a", "#857a00", "#124949", "#737f8c")
DARK = ("#007fff", "#bb781b", "#00ad65", "#d043b9", "#c2a3ff", "#ffc414", "#00ebeb", "#7e8e95")
GROUND = {"light": "#ffffff", "dark": "#14171a"}


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))


STYLE = f"""
:root {{ color-scheme: light dark; --ground: {GROUND["light"]}; --ink: #1c2126; --soft: #59626b; --grid: #e3e6e9;
  --line: #c5cbd1; --raised: #f5f6f8; --peer: #77808a; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: {GROUND["dark"]}; --ink: #e6e9ec; --soft: #a0a9b2;
  --grid: #282e34; --line: #414a53; --raised: #1d2226; --peer: #8b959f; {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1280px; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--grid); }}
p, ul {{ max-width: 46rem; }}
ul {{ padding-left: 1.2rem; }}
code {{ font: .875em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1.4rem;
  margin: 1rem 0; }}
figure {{ margin: 0; max-width: 600px; }}
figcaption {{ font-weight: 600; font-size: .95rem; margin-bottom: .2rem; }}
.chart {{ display: block; width: 100%; height: auto; overflow: visible; }}
.chart text {{ font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }}
.chart .name {{ fill: var(--ink); }}
.grid {{ stroke: var(--grid); }}
.tick, .axis {{ stroke: var(--line); }}
.line {{ fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-dasharray: var(--dash, none); }}
.band {{ fill: var(--c); opacity: .18; }}
.lead {{ fill: none; stroke: var(--c); stroke-width: 1; opacity: .7; }}
.dot {{ fill: var(--c); }}
.hit {{ fill: var(--c); fill-opacity: 0; }}
.hit:hover {{ fill-opacity: .3; }}
.range {{ stroke: var(--c); stroke-width: 2; opacity: .5; }}
.mean {{ stroke: var(--c); stroke-width: 2; }}
.table {{ overflow-x: auto; margin: .8rem 0; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .55rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }}
th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
td {{ white-space: nowrap; }}
.figure {{ text-align: right; }}
td code {{ white-space: normal; }}
td:has(code) {{ white-space: normal; min-width: 9rem; }}
.key {{ display: inline-block; width: .65em; height: .65em; border-radius: 50%; background: var(--c);
  margin-right: .45em; }}
details {{ margin: .8rem 0; }}
summary {{ cursor: pointer; color: var(--soft); }}
@media (max-width: 600px) {{ body {{ padding: 1rem .8rem 3rem; }} h1 {{ font-size: 1.4rem; }}
  .chart text {{ font-size: 13px; }} th, td {{ padding: .3rem .5rem; }} }}
@media print {{ .table {{ overflow: visible; }} }}
"""


def page(title: str, body: str) -> str:
    """Both are HTML already."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
