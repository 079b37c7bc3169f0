"""matplotlib's SVG, made fit for the page."""

from __future__ import annotations

from devguard.watch.report import svg

DRAWING = f"""<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 10 10">
<metadata>x</metadata><defs><style>*{{x}}</style><path id="m"/></defs>
<g id="figure_1"><path d="M 0 0 L 10 10 z" style="fill: #ffffff"/>
<g id="layer own shade-1"><path clip-path="url(#c)" style="fill: #123456" d="M 1.04 9.00
L 1.04 5.00
L 2.000 5.00
L 2.000 5.00
L 3.33 5.01
L 3.33 9.00
L 1.04 9.00
z
"/></g>
<g id="line2d_1"><path d="M 0 1 L 5.55 1.23" style="stroke: {svg.GRID}"/></g>
<g id="line2d_2"><g><use xlink:href="#m" x="1" y="2"/></g></g>
<g id="mark"><path d="M 4 0 L 4 9" style="stroke: #000000"/></g>
<g id="patch_3"><path d="M 0 0 L 0 9" style="stroke: #000000"/></g>
<g id="text_1"><text style="font-size: 10px; text-anchor: end" x="7.368" y="85.789"
 transform="rotate(-0 7 8)">a &lt; b</text></g>
<g id="text_2"><text style="font-size: 10px" transform="translate(11.599654 62.9) rotate(-90)">c</text></g>
</g></svg>"""


def test_styles_become_classes_and_paths_become_short() -> None:
    assert svg.clean(DRAWING, 'a "label"') == (
        '<svg viewBox="0 0 10 10" role="img" aria-label="a &quot;label&quot;" class="chart">'
        '<path class="layer own shade-1" d="M1 9v-4h2.3v4h-2.3z"></path>'
        '<path class="grid" d="M0 1l5.6 0.2"></path>'
        '<path class="mark" d="M4 0v9"></path>'
        '<path class="axis" d="M0 0v9"></path>'
        '<text x="7.4" y="85.8" text-anchor="end">a &lt; b</text>'
        '<text transform="translate(11.6 62.9) rotate(-90)">c</text></svg>'
    )
