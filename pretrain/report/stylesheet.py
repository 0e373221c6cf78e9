"""The page's CSS: system fonts, one column, one accent colour for each run, light and dark."""

from __future__ import annotations

from pretrain.report.style import DARK_OF, GRID, INK, MUTED, PAPER

_NAMED = {"--ink": INK, "--muted": MUTED, "--line": GRID, "--paper": PAPER}

_RULES = """
:root{color-scheme:light dark;--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--sans);-webkit-font-smoothing:antialiased}
main{max-width:1160px;margin:0 auto;padding:44px 28px 72px}
h1{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 26px}
h2{font-size:18px;font-weight:620;letter-spacing:-.008em;margin:0 0 10px}
figcaption,th{color:var(--muted)}
.runs{display:grid;gap:18px 32px;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));margin:0 0 30px}
.run{border-left:3px solid var(--run);padding:1px 0 1px 14px;overflow-wrap:anywhere}
.run h2{font-size:17px;margin:0}
.run ul{list-style:none;margin:5px 0 0;padding:0;font-size:14px}
.status{font-weight:400;font-size:14px;color:var(--muted);margin-left:7px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:8px;overflow:hidden;margin:0 0 44px}
.tiles div{background:var(--paper);padding:13px 16px}
.tiles dt{font-size:12.5px;color:var(--muted)}
.tiles dd{margin:2px 0 0;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.scroll{overflow-x:auto;margin:0 0 44px}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th{font-weight:450;font-size:13px;text-align:right;white-space:nowrap}
th,td{padding:8px 12px;border-bottom:1px solid var(--line)}
td{text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
td:first-child{font-weight:600;white-space:normal;min-width:10em;overflow-wrap:break-word}
.chip{display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--run);margin-right:9px}
section{border-top:1px solid var(--line);padding:24px 0 26px}
figure{margin:0}
figcaption{font-size:13.5px;max-width:85ch;margin:0 0 12px}
svg{display:block;width:100%;height:auto}
@media(max-width:720px){main{padding:26px 16px 48px}}
"""


def stylesheet(light: str, dark: str) -> str:
    """Return the page's rules. light, dark: the declarations of the pictures' colours."""
    light += "".join(f"{name}:{color};" for name, color in _NAMED.items())
    dark += "".join(f"{name}:{DARK_OF[color]};" for name, color in _NAMED.items())
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
