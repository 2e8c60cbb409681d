"""What inspect shows of token rewards: heatmaps side by side, statistics, and a page of its own. No tensors.

The colours are those of `llmdoctor.cli.render`: blue is rewarded, orange punished, both equally light.
"""

import html
from collections.abc import Iterable

# A browser that reads this refuses every script and every request, whatever the data holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1b1b1b; background: #fdfdfd; overflow-wrap: anywhere }
h2 { font-size: 1.2rem } h3 { font-size: 1rem } .note { opacity: .75; font-size: .9rem }
table { border-collapse: collapse } th, td { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #141414 } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """One self-contained page of ``parts``, which are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
