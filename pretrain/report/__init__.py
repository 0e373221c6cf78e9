"""The report of one or several runs: one self-contained HTML page and its pictures, drawn from the run folders alone.

`runs` reads a folder; `weight_series` and `summary` turn it into figures; `curves`, `weight_panels` and `weight_pictures`
draw; `style` holds every colour; `page` sets the HTML; `write` puts everything on disk. No GPU or DeepSpeed is needed.
"""
